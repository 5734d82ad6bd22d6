"""Int groups of columns that are alike rather than neighbours: GPTQ's activation order with ``g_idx``.

Columns are sorted by the mean square of their inputs, the largest first, and each run of `group` of them shares a scale
(``desc_act = true`` without static groups, as auto-gptq and GPTQModel write it). Within a group they lie in their own
order, so the group of each column says everything, and it is what the file's ``g_idx`` holds. Here every row carries
it, so that rows stay independent: a byte per column, two where there are more than 256 groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from llmpack.encodings import encoding, tiles
from llmpack.encodings.encoding import Grid, GridEncoding, Levels
from llmpack.encodings.grouped import IntGroups
from llmpack.encodings.names import ACT, ORDERED_NAMES

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")


@dataclass(frozen=True, eq=False)
class OrderedGrid(Grid):
    """A grid over columns in another order.

    inner  the grid, its columns as they are grouped
    order  [columns] int64: which column of the tensor stands at each place of `inner`
    """

    inner: Grid
    order: Tensor

    @property
    def rows(self) -> int:
        """Rows of the tensor."""
        return self.inner.rows

    @property
    def columns(self) -> int:
        """Columns of the tensor."""
        return self.inner.columns

    @cached_property
    def place(self) -> Tensor:
        """[columns] int64: where in `inner` each column of the tensor stands."""
        return torch.argsort(self.order)

    @property
    def group_of(self) -> Tensor:
        """[columns] int64: which scale group owns a column."""
        return self.inner.group_of[self.place]

    def levels(self, columns: Tensor | slice | None = None) -> Levels:
        """Dense levels of the columns (all, in order, for None); float32."""
        return self.inner.levels(self.place if columns is None else self.place[columns])

    def select_rows(self, rows: Tensor | slice) -> OrderedGrid:
        """The grid of some rows, in the order given."""
        return OrderedGrid(self.inner.select_rows(rows), self.order)


class OrderedIntGroups(GridEncoding):
    """Int codes with a scale per group of columns, those with the largest inputs first.

    neighbours  the name of the same groups of neighbouring columns
    """

    ggml_type = None
    neighbours: ClassVar[str]

    @cached_property
    def base(self) -> IntGroups:
        """The arithmetic and bytes of the groups themselves."""
        found = encoding(self.neighbours)
        if not isinstance(found, IntGroups):
            raise AssertionError(f"{self.neighbours} are int groups")
        return found

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.base.bits

    @property
    def is_symmetric(self) -> bool:
        """Zero is the middle code everywhere."""
        return self.base.is_symmetric

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row, the group of each column among them. Raises ValueError where `problem` tells something."""
        return super().row_bytes(columns) + columns * self._index(columns).itemsize

    def fit(self, W: Tensor, importance: Tensor | None = None) -> Grid:
        """Groups in the order of `importance` (neighbours for None), and their scales of least error weighted by it.

        Raises ValueError for what cannot be stored.
        """
        values, weights = self.base.checked(W, importance)
        return self._fit(values, weights, self._order(weights, values.shape[1]))

    def encode(self, W: Tensor, importance: Tensor | None = None) -> np.ndarray:
        """Round to nearest on a grid fitted with `importance`; [rows, row bytes] uint8."""
        values, weights = self.base.checked(W, importance)
        rows, columns = values.shape
        order = self._order(weights, columns)
        packed = np.empty((rows, self.row_bytes(columns)), dtype=np.uint8)
        for run in tiles.runs(rows, columns, tiles.SLAB):
            packed[run] = self.round(values[run], self._fit(values[run], weights, order)).pack()
        return packed

    def refit(self, codes: Tensor, grid: Grid, W: Tensor, H: Tensor) -> Grid:
        """Scales that lower ``tr((W - Q) H (W - Q)^T)`` with codes and groups held; no row gets worse."""
        own = self._own(grid)
        order = own.order
        moved = self.base.refit(codes[:, order], own.inner, W[:, order], H[order[:, None], order])
        return OrderedGrid(moved, order)

    def pack(self, codes: Tensor, grid: Grid) -> np.ndarray:
        """[rows, row bytes] uint8. Raises ValueError where codes and grid do not belong together."""
        own = self._own(grid)
        if codes.shape != (own.rows, own.columns):
            raise ValueError(f"codes {list(codes.shape)} on a grid of {own.rows} x {own.columns}")
        groups = own.group_of.cpu().numpy().astype(self._index(own.columns)).view(np.uint8)
        return np.hstack([self.base.pack(codes[:, own.order], own.inner), np.tile(groups, (own.rows, 1))])

    def unpack(self, packed: np.ndarray, columns: int) -> tuple[Tensor, Grid]:
        """Exact inverse of `pack`: codes [rows, columns] int32 and the grid. Raises ValueError for damaged rows."""
        rows = tiles.packed_matrix(packed, self, columns)
        end = self.base.row_bytes(columns)
        groups = np.ascontiguousarray(rows[:1, end:]).view(self._index(columns))[0].astype(np.int64)
        expected = np.arange(columns) // self.base.group_in(columns)
        if (rows[:, end:] != rows[:1, end:]).any() or (np.sort(groups) != expected).any():
            raise ValueError(f"rows of {self.name} disagree about the group of a column, or a group is not full")
        order = torch.from_numpy(np.argsort(groups, kind="stable"))
        codes, inner = self.base.unpack(rows[:, :end], columns)
        grid = OrderedGrid(inner, order)
        return codes[:, grid.place], grid

    def _fit(self, W: Tensor, weights: Tensor | None, order: Tensor) -> OrderedGrid:
        return OrderedGrid(self.base.fit(W[:, order], None if weights is None else weights[order]), order)

    def _order(self, weights: Tensor | None, columns: int) -> Tensor:
        """[columns] int64: columns group by group, within each in their own order."""
        if weights is None:
            return torch.arange(columns)
        group = self.base.group_in(columns)
        ranked = torch.argsort(weights, descending=True, stable=True)
        return ranked.view(-1, group).sort(dim=1).values.view(-1)

    def _index(self, columns: int) -> np.dtype[np.uint8] | np.dtype[np.uint16]:
        """What holds the number of a group."""
        return np.dtype(np.uint8) if columns // self.base.group_in(columns) <= 256 else np.dtype("<u2")

    def _own(self, grid: Grid) -> OrderedGrid:
        if not isinstance(grid, OrderedGrid):
            raise ValueError(f"the grid was not fitted for {self.name}")
        return grid


def _made(name: str) -> type[OrderedIntGroups]:
    """The encoding of that name."""
    neighbours = name.removesuffix(ACT)
    base = type(encoding(neighbours))
    body = {
        "__doc__": f"As {neighbours}, of columns with inputs alike in size (GPTQ, desc_act).",
        "__module__": __name__,
        "name": name,
        "neighbours": neighbours,
        "block": base.block,
        "block_bytes": base.block_bytes,
    }
    return type(name, (OrderedIntGroups,), body)


globals().update({name: _made(name) for name in ORDERED_NAMES})
