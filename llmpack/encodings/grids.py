"""Grids of GGUF blocks and int groups: every scale, minimum and zero as the file stores them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from llmpack.encodings.encoding import Grid, Levels
from llmpack.encodings.search import to_half, to_unit
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
    def units(self) -> tuple[Tensor, ...]:
        """The real numbers among what is stored, float32: those that may move a little while codes stay; often none."""
        return ()

    @property
    def strides(self) -> tuple[Tensor, ...]:
        """How far a natural step moves each of `units`, float32, not negative: in proportion to a scale."""
        return ()

    def spread(self, units: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """Scales and offsets [rows, groups] with other units, in their dtype; gradients pass through."""
        return self.scales, self.offsets

    def moved(self, units: tuple[Tensor, ...]) -> Self:
        """The grid with other units, rounded to what the file stores."""
        return self

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
    def units(self) -> tuple[Tensor, ...]:
        """d, and m where there is one."""
        return tuple(half.to(torch.float32) for half in (self.d, self.m) if half is not None)

    @property
    def strides(self) -> tuple[Tensor, ...]:
        """A scale moves in proportion to itself, a minimum in proportion to its scale."""
        return tuple(self.d.to(torch.float32).abs() for _ in self.units)

    def spread(self, units: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """The units themselves."""
        return units[0], units[1] if len(units) > 1 else None

    def moved(self, units: tuple[Tensor, ...]) -> BlockGrid:
        """The grid with other d and m."""
        return BlockGrid(_half(units[0], self.d), None if self.m is None else _half(units[1]), self.steps, self.group)

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
class ZeroGrid(ScaleGrid):
    """A scale per group, and the code that stands for zero in it: ``value = scale * (code - zero)``.

    d      [rows, groups] float16
    zeros  [rows, groups] uint8
    """

    d: Tensor
    zeros: Tensor
    steps: Steps
    group: int

    @cached_property
    def scales(self) -> Tensor:
        """[rows, groups] float32."""
        return self.d.to(torch.float32)

    @property
    def offsets(self) -> Tensor | None:
        """None: zero is a code."""
        return None

    @property
    def stored(self) -> Stored:
        """d and zeros."""
        return self.d, self.zeros

    def holding(self, stored: Stored) -> ZeroGrid:
        """The grid of another d and zeros."""
        d, zeros = stored
        if d is None or zeros is None:
            raise ValueError("a grid with zeros has scales and zeros")
        return ZeroGrid(d, zeros, self.steps, self.group)

    def levels(self, columns: Tensor | slice | None = None) -> Levels:
        """Dense levels of the columns (all, in order, for None); float32."""
        groups = self.group_of if columns is None else self.group_of[columns]
        zeros = self.zeros.index_select(1, groups).to(torch.int32)
        return Levels(scale=self.scales.index_select(1, groups), high=self.steps.codes - 1, zero=zeros)

    def multiples(self, codes: Tensor) -> Tensor:
        """What codes stand for in units of their scale, float32."""
        return codes.to(torch.float32) - self.zeros.index_select(1, self.group_of).to(torch.float32)


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
        return _spread(self.d.to(torch.float32), self.factors)

    @cached_property
    def offsets(self) -> Tensor | None:
        """[rows, groups] float32, or None."""
        if self.dmin is None or self.minima is None:
            return None
        return -_spread(self.dmin.to(torch.float32), self.minima)

    @property
    def units(self) -> tuple[Tensor, ...]:
        """d, and dmin where there is one."""
        return tuple(half.to(torch.float32) for half in (self.d, self.dmin) if half is not None)

    @property
    def strides(self) -> tuple[Tensor, ...]:
        """Each moves in proportion to itself."""
        return tuple(unit.abs() for unit in self.units)

    def spread(self, units: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """Each group's integers times the units of its super-block."""
        scales = _spread(units[0], self.factors)
        return scales, None if self.minima is None else -_spread(units[1], self.minima)

    def moved(self, units: tuple[Tensor, ...]) -> SuperGrid:
        """The grid with other d and dmin."""
        dmin = None if self.dmin is None else _half(units[1], self.dmin)
        return SuperGrid(_half(units[0], self.d), dmin, self.factors, self.minima, self.steps, self.group)

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
    """Each group's integer times the unit of its super-block, in float32 as llama.cpp multiplies, or in float64."""
    per = integers.shape[1] // unit.shape[1]
    return unit.repeat_interleave(per, dim=1) * integers.to(unit.dtype)


def _half(unit: Tensor, before: Tensor | None = None) -> Tensor:
    """As float16; with what it was before: only a scale that was 0 may become 0."""
    rounded = to_half(unit) if before is None else torch.where(before == 0, 0.0, to_unit(unit))
    return rounded.to(torch.float16)
