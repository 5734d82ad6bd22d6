"""The multiples of a scale that codes stand for, and which of them is nearest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

LONGEST = 4096
"""Entries of the longest table from doubled values to codes."""


@dataclass(frozen=True)
class Steps:
    """Code c stands for the multiple ``low + c``, or ``table[c]`` where there is a table (ascending integers)."""

    low: int
    high: int
    table: tuple[int, ...] | None = None

    @property
    def codes(self) -> int:
        """How many codes there are."""
        return self.high - self.low + 1 if self.table is None else len(self.table)

    @property
    def first_code(self) -> int:
        """The code of multiple 0; 0 where a table says what codes mean."""
        return -self.low if self.table is None else 0

    @property
    def values(self) -> Tensor | None:
        """The table as float32, or None."""
        return None if self.table is None else torch.tensor(self.table, dtype=torch.float32)

    @property
    def ends(self) -> tuple[int, ...]:
        """The outermost multiples other than 0."""
        return tuple(end for end in (self.low, self.high) if end)


@dataclass(frozen=True)
class Lookup:
    """Nearest entries of an ascending table of numbers whose middles are whole or half.

    first   the entry of `codes` for doubled values up to this one is the first
    codes   int32: code by doubled value, rounded up, less `first`
    values  float32: the table's entries in place of codes
    """

    first: int
    codes: Tensor
    values: Tensor

    def index(self, ratio: Tensor) -> Tensor:
        """Turn `ratio` (float, overwritten) into positions in `codes`. A middle belongs to the lower entry."""
        return ratio.mul_(2).ceil_().clamp_(self.first, self.first + self.codes.numel() - 1).sub_(self.first)


@lru_cache(maxsize=16)
def lookup(table: tuple[float, ...]) -> Lookup | None:
    """How to look entries up in one step, or None where middles are not whole or half, or far apart."""
    doubled = [below + above for below, above in pairwise(table)]
    if any(middle != int(middle) for middle in doubled) or doubled[-1] - doubled[0] >= LONGEST:
        return None
    first, last = int(doubled[0]), int(doubled[-1]) + 1
    codes = torch.bucketize(torch.arange(first, last + 1), torch.tensor(doubled, dtype=torch.float64), out_int32=True)
    return Lookup(first, codes, torch.tensor(table, dtype=torch.float32)[codes.long()])
