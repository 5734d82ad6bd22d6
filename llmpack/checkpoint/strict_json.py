"""JSON from strangers: size, depth, duplicate keys, encoding and absurd numbers are checked."""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 64


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:80]!r} stands twice in one object")
            seen.add(key)
    return found


def _check_values(value: Any, max_depth: int) -> None:
    """Depth and lone surrogates, without recursion."""
    stack = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        if isinstance(item, str):
            if not item.isascii() and any("\ud800" <= c <= "\udfff" for c in item):
                raise ValueError(f"{item[:80]!r} has half of a surrogate pair, which is no text")
            continue
        if not isinstance(item, dict | list):
            continue
        if depth > max_depth:
            raise ValueError(f"nested more than {max_depth} deep")
        if isinstance(item, dict):
            stack.extend((key, depth) for key in item)
            stack.extend((inner, depth + 1) for inner in item.values())
        else:
            stack.extend((inner, depth + 1) for inner in item)


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
    _check_values(value, max_depth)
    return value
