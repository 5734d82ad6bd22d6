"""What encodings with codes in blocks share: work in runs of rows, and blocks as bytes."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from llmpack.encodings import bits, tiles
from llmpack.encodings.encoding import Grid, GridEncoding
from llmpack.encodings.grids import BlockGrid, ScaleGrid, stacked
from llmpack.encodings.refit import Descent, descend_halves
from llmpack.encodings.search import HALF_MAX, Groups, affine, symmetric, to_half, to_unit
from llmpack.encodings.steps import Steps
from llmpack.parallel import each, even

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    np = LazyModule("numpy")
    torch = LazyModule("torch")


class BlockwiseEncoding(GridEncoding):
    """Blocks of columns that know nothing of each other.

    group  columns that share a scale; divides `block`
    steps  the multiples of a scale that codes stand for
    reach  the largest absolute number, in units of the largest float16
    """

    group: ClassVar[int]
    steps: ClassVar[Steps]
    reach: ClassVar[int]

    def group_in(self, columns: int) -> int:
        """Columns that share a scale in rows of that length."""
        return self.group

    def block_in(self, columns: int) -> int:
        """Columns of a block in rows of that length."""
        return self.block

    @abstractmethod
    def fit_rows(self, x: Tensor, w: Tensor, rows: int) -> ScaleGrid:
        """The grid of a few rows: numbers and weights upright, [group, rows * groups]."""

    @abstractmethod
    def refit_rows(self, grid: ScaleGrid, descent: Descent) -> ScaleGrid:
        """The grid of a few rows, its scales moved down the full Hessian."""

    @abstractmethod
    def pack_blocks(self, codes: np.ndarray, grid: ScaleGrid) -> np.ndarray:
        """Codes, [n, block] uint8 of all blocks of all rows, and their grid, as [n, block_bytes] uint8."""

    @abstractmethod
    def unpack_blocks(self, packed: np.ndarray, rows: int) -> tuple[np.ndarray, ScaleGrid]:
        """Inverse of `pack_blocks`; the n blocks make `rows` rows."""

    def checked(self, W: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`W` and `importance` as float32. Raises ValueError where they cannot be encoded."""
        values = tiles.matrix(W, self.name)
        self.row_bytes(values.shape[1])
        if not values.numel():
            raise ValueError(f"a tensor of shape {list(values.shape)} has nothing to store as {self.name}")
        top = float(values.abs().max())
        if top > HALF_MAX * self.reach:
            raise ValueError(f"{top:g} is beyond {HALF_MAX * self.reach:g}, the largest number that {self.name} stores")
        return values, tiles.weights_of(importance, values.shape[1])

    def fit(self, W: Tensor, importance: Tensor | None = None) -> Grid:
        """Scales of least error weighted by `importance`, as stored. Raises ValueError for what cannot be stored."""
        return self._fit(*self.checked(W, importance))

    def encode(self, W: Tensor, importance: Tensor | None = None) -> np.ndarray:
        """Round to nearest on a grid fitted with `importance`; [rows, row bytes] uint8."""
        values, weights = self.checked(W, importance)
        rows, columns = values.shape
        packed = np.empty((rows, self.row_bytes(columns)), dtype=np.uint8)
        for run in tiles.runs(rows, columns, tiles.SLAB):
            packed[run] = self.round(values[run], self._fit(values[run], weights)).pack()
        return packed

    def refit(self, codes: Tensor, grid: Grid, W: Tensor, H: Tensor) -> Grid:
        """Scales that lower ``tr((W - Q) H (W - Q)^T)`` with the codes held; no row gets worse."""
        own = self._own(codes, grid)
        values, hessian = tiles.matrix(W, self.name), H.to(torch.float32)
        rows, columns = values.shape

        def moved(run: slice) -> ScaleGrid:
            some = own.select_rows(run)
            error = values[run] - some.levels().decode(codes[run])
            return self.refit_rows(some, Descent(some.multiples(codes[run]), error, hessian, own.group))

        return stacked(each(moved, even(rows, max(1, tiles.SLAB // columns), 1)))

    def pack(self, codes: Tensor, grid: Grid) -> np.ndarray:
        """[rows, row bytes] uint8. Raises ValueError where codes and grid do not belong together."""
        own = self._own(codes, grid)
        if not 0 <= int(codes.min()) <= int(codes.max()) < self.steps.codes:
            raise ValueError(f"{self.name} has codes 0 .. {self.steps.codes - 1}")
        plain = codes.to(torch.uint8).cpu().contiguous().numpy().reshape(-1, self.block_in(grid.columns))
        return self.pack_blocks(plain, own).reshape(grid.rows, self.row_bytes(grid.columns))

    def unpack(self, packed: np.ndarray, columns: int) -> tuple[Tensor, Grid]:
        """Exact inverse of `pack`: codes [rows, columns] int32 and the grid."""
        rows = tiles.packed_matrix(packed, self, columns)
        blocks = np.ascontiguousarray(rows).reshape(rows.shape[0] * (columns // self.block_in(columns)), -1)
        codes, grid = self.unpack_blocks(blocks, rows.shape[0])
        return torch.from_numpy(codes.reshape(rows.shape[0], columns).astype(np.int32)), grid

    def owns(self, grid: ScaleGrid) -> bool:
        """Whether it stores codes on a grid of that kind."""
        return grid.steps == self.steps and grid.group == self.group_in(grid.columns)

    def _own(self, codes: Tensor, grid: Grid) -> ScaleGrid:
        if not isinstance(grid, ScaleGrid) or not self.owns(grid):
            raise ValueError(f"the grid was not fitted for {self.name}")
        if codes.shape != (grid.rows, grid.columns):
            raise ValueError(f"codes {list(codes.shape)} on a grid of {grid.rows} x {grid.columns}")
        return grid

    def _fit(self, W: Tensor, weights: Tensor | None) -> ScaleGrid:
        group, block = self.group_in(W.shape[1]), self.block_in(W.shape[1])

        def fitted(run: slice) -> ScaleGrid:
            x = tiles.upright(W[run], group)
            return self.fit_rows(x, tiles.upright_weights(weights, W[run], group, block), len(W[run]))

        return stacked(each(fitted, tiles.tiles(*W.shape)))


class BlockEncoding(BlockwiseEncoding):
    """A float16 scale per block of 32, and perhaps a minimum; then the codes."""

    block = 32
    group = 32
    has_minimum: ClassVar[bool] = False

    def owns(self, grid: ScaleGrid) -> bool:
        """Whether it stores codes on a grid of that kind."""
        return super().owns(grid) and isinstance(grid, BlockGrid) and (grid.m is not None) == self.has_minimum

    @abstractmethod
    def pack_codes(self, codes: np.ndarray) -> np.ndarray:
        """[n, 32] uint8 codes as [n, bytes] uint8."""

    @abstractmethod
    def unpack_codes(self, packed: np.ndarray) -> np.ndarray:
        """Inverse of `pack_codes`."""

    def fit_rows(self, x: Tensor, w: Tensor, rows: int) -> ScaleGrid:
        """The grid of a few rows."""
        groups = Groups(x, w, self.steps)
        if self.has_minimum:
            return self._grid(*(part.view(rows, -1) for part in affine(groups, to_half, below_zero=False)[:2]))
        return self._grid(symmetric(groups, to_unit)[0].view(rows, -1))

    def refit_rows(self, grid: ScaleGrid, descent: Descent) -> ScaleGrid:
        """The grid of a few rows, its scales moved down the full Hessian."""
        parts = [grid.scales] if grid.offsets is None else [grid.scales, grid.offsets]
        return self._grid(*(found.T for found in descend_halves(descent, [part.T for part in parts])))

    def pack_blocks(self, codes: np.ndarray, grid: ScaleGrid) -> np.ndarray:
        """[n, block_bytes] uint8."""
        halves = [half.cpu().reshape(-1, 1).numpy() for half in grid.stored if half is not None]
        return np.concatenate([*map(bits.half_bytes, halves), self.pack_codes(codes)], axis=1)

    def unpack_blocks(self, packed: np.ndarray, rows: int) -> tuple[np.ndarray, ScaleGrid]:
        """Codes [n, 32] uint8 and the grid."""
        head = 4 if self.has_minimum else 2
        halves = torch.from_numpy(bits.bytes_half(packed[:, :head])).reshape(rows, -1, head // 2)
        return self.unpack_codes(packed[:, head:]), self._grid(*halves.unbind(2))

    def _grid(self, d: Tensor, m: Tensor | None = None) -> BlockGrid:
        half = torch.float16
        minima = None if m is None else m.to(half).contiguous()
        return BlockGrid(d.to(half).contiguous(), minima, self.steps, self.group)
