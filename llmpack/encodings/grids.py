"""Grids of GGUF blocks: every scale and minimum as the file stores them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from llmpack.encodings.encoding import Grid, Levels
from llmpack.encodings.search import Steps

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")


class ScaleGrid(Grid):
    """A grid whose groups are runs of equally many columns, each with a scale and perhaps an offset.

    group  columns per group
    steps  which multiples of the scale the codes stand for
    """

    group: int
    steps: Steps

    @property
    @abstractmethod
    def scales(self) -> Tensor:
        """[rows, groups] float32."""

    @property
    @abstractmethod
    def offsets(self) -> Tensor | None:
        """[rows, groups] float32, or None where the encoding has none."""

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
        """[columns] int64."""
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


@dataclass(frozen=True)
class BlockGrid(ScaleGrid):
    """A scale per block, and a minimum where the encoding has one.

    d  [rows, blocks] float16
    m  [rows, blocks] float16, or None
    """

    d: Tensor
    m: Tensor | None
    steps: Steps
    group: int = 32

    @cached_property
    def scales(self) -> Tensor:
        """[rows, blocks] float32."""
        return self.d.to(torch.float32)

    @cached_property
    def offsets(self) -> Tensor | None:
        """[rows, blocks] float32, or None."""
        return None if self.m is None else self.m.to(torch.float32)

    def select_rows(self, rows: Tensor | slice) -> BlockGrid:
        """The grid of some rows, in the order given."""
        return BlockGrid(self.d[rows], None if self.m is None else self.m[rows], self.steps, self.group)
