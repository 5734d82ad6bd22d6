"""Grids of GGUF blocks: every scale and minimum as the file stores them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from llmpack.encodings.encoding import Grid, Levels
from llmpack.encodings.steps import Steps

if TYPE_CHECKING:
    from typing import Self

    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

Stored = tuple["Tensor | None", ...]


class ScaleGrid(Grid):
    """A grid whose groups are runs of equally many columns, each with a scale and perhaps an offset.

    steps   which multiples of the scale the codes stand for
    group   columns per group
    """

    steps: Steps
    group: int

    @property
    @abstractmethod
    def scales(self) -> Tensor:
        """[rows, groups] float32."""

    @property
    @abstractmethod
    def offsets(self) -> Tensor | None:
        """[rows, groups] float32, or None where the encoding has none."""

    @property
    @abstractmethod
    def stored(self) -> Stored:
        """What the file stores of it; the first size of each tensor is rows."""

    @abstractmethod
    def holding(self, stored: Stored) -> Self:
        """A grid of the same kind of other stored numbers."""

    @property
    def rows(self) -> int:
        """Rows of the tensor."""
        return int(self.scales.shape[0])

    @property
    def columns(self) -> int:
        """Columns of the tensor."""
        return int(self.scales.shape[1]) * self.group

    @property
    def group_of(self) -> Tensor:
        """[columns] int64: which scale group owns a column."""
        return torch.arange(self.columns, device=self.scales.device) // self.group

    def levels(self, columns: Tensor | slice | None = None) -> Levels:
        """Dense levels of the columns (all, in order, for None); float32."""
        groups = self.group_of if columns is None else self.group_of[columns]
        offsets = self.offsets
        return Levels(
            scale=self.scales.index_select(1, groups),
            high=self.steps.codes - 1,
            zero=self.steps.first_code,
            offset=None if offsets is None else offsets.index_select(1, groups),
            table=self.steps.values,
        )

    def multiples(self, codes: Tensor) -> Tensor:
        """What codes stand for in units of their scale, float32."""
        values = self.steps.values
        if values is None:
            return codes.to(torch.float32) - self.steps.first_code
        return values.to(codes.device)[codes.long()]

    def select_rows(self, rows: Tensor | slice) -> Self:
        """The grid of some rows, in the order given."""
        return self.holding(tuple(None if part is None else part[rows] for part in self.stored))


def stacked(grids: Sequence[ScaleGrid]) -> ScaleGrid:
    """Grids of one kind below each other."""
    if not grids:
        raise ValueError("a grid has at least one row")
    parts = zip(*(grid.stored for grid in grids), strict=True)
    present = [[part for part in column if part is not None] for column in parts]
    return grids[0].holding(tuple(torch.cat(column) if column else None for column in present))


@dataclass(frozen=True, eq=False)
class BlockGrid(ScaleGrid):
    """A scale per block of columns, and a minimum where the encoding has one.

    d  [rows, blocks] float16
    m  [rows, blocks] float16, or None
    """

    d: Tensor
    m: Tensor | None
    steps: Steps
    group: int

    @cached_property
    def scales(self) -> Tensor:
        """[rows, blocks] float32."""
        return self.d.to(torch.float32)

    @cached_property
    def offsets(self) -> Tensor | None:
        """[rows, blocks] float32, or None."""
        return None if self.m is None else self.m.to(torch.float32)

    @property
    def stored(self) -> Stored:
        """d and m."""
        return self.d, self.m

    def holding(self, stored: Stored) -> BlockGrid:
        """The grid of another d and m."""
        d, m = stored
        if d is None:
            raise ValueError("a block grid has scales")
        return BlockGrid(d, m, self.steps, self.group)


@dataclass(frozen=True, eq=False)
class SuperGrid(ScaleGrid):
    """Integer scales of groups, and minima, in units of float16 numbers that a super-block of groups shares.

    d         [rows, super-blocks] float16
    dmin      [rows, super-blocks] float16, or None
    factors   [rows, groups] int16: ``scale = d * factor``
    minima    [rows, groups] int16, or None: ``offset = -dmin * minimum``
    """

    d: Tensor
    dmin: Tensor | None
    factors: Tensor
    minima: Tensor | None
    steps: Steps
    group: int

    @cached_property
    def scales(self) -> Tensor:
        """[rows, groups] float32."""
        return _spread(self.d, self.factors)

    @cached_property
    def offsets(self) -> Tensor | None:
        """[rows, groups] float32, or None."""
        return None if self.dmin is None or self.minima is None else -_spread(self.dmin, self.minima)

    @property
    def stored(self) -> Stored:
        """d, dmin, factors and minima."""
        return self.d, self.dmin, self.factors, self.minima

    def holding(self, stored: Stored) -> SuperGrid:
        """The grid of other numbers."""
        d, dmin, factors, minima = stored
        if d is None or factors is None:
            raise ValueError("a grid of super-blocks has scales")
        return SuperGrid(d, dmin, factors, minima, self.steps, self.group)


def _spread(unit: Tensor, integers: Tensor) -> Tensor:
    """Each group's integer times the unit of its super-block, in float32 as llama.cpp multiplies."""
    per = integers.shape[1] // unit.shape[1]
    return unit.to(torch.float32).repeat_interleave(per, dim=1) * integers.to(torch.float32)
