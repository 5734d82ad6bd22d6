"""JSON from strangers: size, depth, duplicate keys, encoding and absurd numbers are checked."""

from __future__ import annotations

import json
import re
from typing import Any

MAX_DEPTH = 64
_NESTED = frozenset((dict, list))
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:80]!r} stands twice in one object")
            seen.add(key)
    return found


def _check_depth(value: Any, max_depth: int) -> None:
    """Without recursion."""
    stack = [(value, 1)] if isinstance(value, dict | list) else []
    while stack:
        item, depth = stack.pop()
        if depth > max_depth:
            raise ValueError(f"nested more than {max_depth} deep")
        parts = item.values() if isinstance(item, dict) else item
        if _NESTED.isdisjoint(map(type, parts)):
            continue
        stack.extend((part, depth + 1) for part in parts if isinstance(part, dict | list))


def _check_text(value: Any) -> None:
    """Refuse halves of surrogate pairs, which Python reads and cannot write."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack.extend(item)
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
        elif isinstance(item, str) and _SURROGATE.search(item):
            raise ValueError(f"{item[:80]!r} has half of a surrogate pair, which is no text")


def parse_json(data: bytes, max_depth: int = MAX_DEPTH) -> Any:
    """The value of a JSON document in UTF-8.

    Raises ValueError with one sentence for bad UTF-8, bad JSON, a key that stands twice in an object, nesting beyond
    `max_depth`, half surrogate pairs and integers of thousands of digits. NaN and Infinity are let through (configs
    of some families hold them); who needs finite numbers checks.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError(f"nested more than {max_depth} deep") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from error
    _check_depth(value, max_depth)
    if _ESCAPED_SURROGATE.search(data):
        _check_text(value)
    return value
