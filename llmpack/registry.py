"""Tables of named parts: a literal dictionary from name to ``module:object``, loaded at first use.

Other packages add entries through entry points (group ``llmpack.<plural>``); a name taken twice is
an error. Nothing is found by scanning, so listing names imports nothing.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar, cast

from llmpack.errors import UsageError

T = TypeVar("T")


def suggestion(name: str, known: Mapping[str, object] | list[str] | tuple[str, ...]) -> str:
    """``"; did you mean `q4_0`?"`` for a near miss, else the list of what is known."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean `{close[0]}`?"
    return f"; known: {', '.join(sorted(names))}"


class Table(Generic[T]):
    """Names of one kind of part and where each is defined."""

    def __init__(self, kind: str, entries: Mapping[str, str], group: str | None = None) -> None:
        self.kind = kind
        self._own = dict(entries)
        self._group = group
        self._loaded: dict[str, T] = {}

    @cached_property
    def _entries(self) -> dict[str, str]:
        merged = dict(self._own)
        for point in entry_points(group=self._group) if self._group else ():
            if point.name in merged:
                raise UsageError(f"{self.kind} `{point.name}` is defined twice: {merged[point.name]} and {point.value}")
            merged[point.name] = point.value
        return merged

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def load(self, name: str) -> T:
        """The object of that name. Raises UsageError with a suggestion for an unknown one."""
        if name in self._loaded:
            return self._loaded[name]
        if name not in self._entries:
            raise UsageError(f"unknown {self.kind} `{name}`{suggestion(name, self._entries)}")
        module, _, attribute = self._entries[name].partition(":")
        found: Any = getattr(importlib.import_module(module), attribute)
        self._loaded[name] = cast("T", found)
        return self._loaded[name]

    def items(self) -> Iterator[tuple[str, T]]:
        """Every entry, loaded."""
        for name in self:
            yield name, self.load(name)
