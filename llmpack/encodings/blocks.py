"""What encodings with codes in blocks share: work in runs of rows, and blocks as bytes."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from llmpack.encodings import bits, refit, tiles
from llmpack.encodings.encoding import Grid, GridEncoding
from llmpack.encodings.grids import BlockGrid, ScaleGrid
from llmpack.encodings.search import HALF_MAX, Steps, to_half

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")


class BlockwiseEncoding(GridEncoding):
    """Blocks of columns that know nothing of each other.

    group  columns that share a scale; divides `block`
    steps  the multiples of a scale that codes stand for
    reach  the largest absolute multiple, by which float16's largest number bounds what can be stored
    """

    group: ClassVar[int]
    steps: ClassVar[Steps]
    reach: ClassVar[float]

    @abstractmethod
    def fit_rows(self, W: Tensor, weights: Tensor | None) -> ScaleGrid:
        """The grid of a few rows. `weights` [columns] float32, largest 1, or None for ones."""

    @abstractmethod
    def refit_rows(self, codes: Tensor, grid: ScaleGrid, W: Tensor, H: Tensor) -> ScaleGrid:
        """`refit` of a few rows."""

    @abstractmethod
    def join(self, grids: list[ScaleGrid]) -> ScaleGrid:
        """Grids of consecutive rows as one."""

    @abstractmethod
    def pack_blocks(self, codes: np.ndarray, grid: ScaleGrid) -> np.ndarray:
        """Codes, [n, block] uint8 of all blocks of all rows, and their grid, as [n, block_bytes] uint8."""

    @abstractmethod
    def unpack_blocks(self, packed: np.ndarray, rows: int) -> tuple[np.ndarray, ScaleGrid]:
        """Inverse of `pack_blocks`; the n blocks make `rows` rows."""

    def fit(self, W: Tensor, importance: Tensor | None = None) -> Grid:
        """Scales of least weighted error, as stored. Raises ValueError for what cannot be stored."""
        values, weights = self.checked(W, importance)
        rows, columns = values.shape
        return self.join([self.fit_rows(values[run], weights) for run in tiles.runs(rows, columns, tiles.TILE)])

    def encode(self, W: Tensor, importance: Tensor | None = None) -> np.ndarray:
        """Round to nearest on a grid fitted with `importance`; [rows, row bytes] uint8."""
        values, weights = self.checked(W, importance)
        rows, columns = values.shape
        packed = np.empty((rows, self.row_bytes(columns)), dtype=np.uint8)
        for run in tiles.runs(rows, columns, tiles.SLAB):
            packed[run] = self.round(values[run], self.fit(values[run], weights)).pack()
        return packed

    def decode(self, packed: np.ndarray, columns: int) -> Tensor:
        """[rows, columns] float32 of packed rows."""
        rows = tiles.packed_matrix(packed, self, columns)
        values = torch.empty(rows.shape[0], columns)
        for run in tiles.runs(rows.shape[0], columns, tiles.SLAB):
            codes, grid = self.unpack(rows[run], columns)
            values[run] = grid.levels().decode(codes)
        return values

    def pack(self, codes: Tensor, grid: Grid) -> np.ndarray:
        """[rows, row bytes] uint8. Raises ValueError where codes and grid do not belong together."""
        if not isinstance(grid, ScaleGrid) or grid.steps != self.steps or grid.group != self.group:
            raise ValueError(f"the grid was not fitted for {self.name}")
        if codes.shape != (grid.rows, grid.columns):
            raise ValueError(f"codes {list(codes.shape)} on a grid of {grid.rows} x {grid.columns}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.steps.codes:
            raise ValueError(f"{self.name} has codes 0 .. {self.steps.codes - 1}")
        plain = codes.to(torch.uint8).cpu().contiguous().numpy().reshape(-1, self.block)
        return self.pack_blocks(plain, grid).reshape(grid.rows, self.row_bytes(grid.columns))

    def unpack(self, packed: np.ndarray, columns: int) -> tuple[Tensor, Grid]:
        """Exact inverse of `pack`: codes [rows, columns] int32 and the grid."""
        rows = tiles.packed_matrix(packed, self, columns)
        blocks = np.ascontiguousarray(rows).reshape(-1, self.block_bytes)
        codes, grid = self.unpack_blocks(blocks, rows.shape[0])
        return torch.from_numpy(codes.reshape(rows.shape[0], columns)).to(torch.int32), grid

    def refit(self, codes: Tensor, grid: Grid, W: Tensor, H: Tensor) -> Grid:
        """Scales that lower ``tr((W - Q) H (W - Q)^T)`` with the codes held; no row gets worse."""
        if not isinstance(grid, ScaleGrid) or codes.shape != W.shape:
            raise ValueError(f"codes {list(codes.shape)} and their {self.name} grid do not belong to W {list(W.shape)}")
        values, H = tiles.matrix(W, self.name), H.to(torch.float32)
        rows, columns = values.shape
        parts = []
        for run in tiles.runs(rows, 4 * (columns // self.group) ** 2, tiles.SLAB):
            chosen = grid.select_rows(torch.arange(run.start, run.stop, device=values.device))
            if not isinstance(chosen, ScaleGrid):
                raise ValueError(f"the grid was not fitted for {self.name}")
            parts.append(self.refit_rows(codes[run], chosen, values[run], H))
        return self.join(parts)

    def checked(self, W: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`W` and `importance` as float32. Raises ValueError where they cannot be encoded."""
        values = tiles.matrix(W, self.name)
        self.row_bytes(values.shape[1])
        top = float(values.abs().max()) if values.numel() else 0.0
        if top > HALF_MAX * self.reach:
            raise ValueError(f"{top:g} is beyond {HALF_MAX * self.reach:g}, the largest number that {self.name} stores")
        return values, tiles.weights_of(importance, values.shape[1])


class BlockEncoding(BlockwiseEncoding):
    """A float16 scale per block of 32, and perhaps a minimum; then the codes."""

    block = 32
    group = 32
    has_minimum: ClassVar[bool] = False

    @abstractmethod
    def pack_codes(self, codes: np.ndarray) -> np.ndarray:
        """[n, 32] uint8 codes as [n, bytes] uint8."""

    @abstractmethod
    def unpack_codes(self, packed: np.ndarray) -> np.ndarray:
        """Inverse of `pack_codes`."""

    @abstractmethod
    def search(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales and minima, each [n] and exact in float16, of blocks x [32, n] with weights w."""

    def fit_rows(self, W: Tensor, weights: Tensor | None) -> BlockGrid:
        """The grid of a few rows."""
        x = tiles.upright(W, self.block)
        d, m = self.search(x, tiles.upright_weights(weights, W, self.block, self.block))
        shape = (W.shape[0], -1)
        half = torch.float16
        return BlockGrid(d.to(half).reshape(shape), None if m is None else m.to(half).reshape(shape), self.steps)

    def refit_rows(self, codes: Tensor, grid: ScaleGrid, W: Tensor, H: Tensor) -> BlockGrid:
        """`refit` of a few rows: the normal equations by coordinate descent over float16."""
        if not isinstance(grid, BlockGrid):
            raise ValueError(f"the grid was not fitted for {self.name}")
        levels = grid.levels()
        multiples = replace(levels, scale=torch.ones_like(levels.scale), offset=None).decode(codes)
        start = grid.scales if grid.offsets is None else torch.cat([grid.scales, grid.offsets], dim=1)
        curvature = (refit.offset_curvature if self.has_minimum else refit.curvature)(multiples, H, self.group)
        pull = refit.gradient(W - levels.decode(codes), multiples, H, self.group, self.has_minimum)
        found = refit.descend(start, curvature, pull, to_half).to(torch.float16)
        if not self.has_minimum:
            return BlockGrid(found, None, self.steps)
        d, m = found.chunk(2, dim=1)
        return BlockGrid(d.contiguous(), m.contiguous(), self.steps)

    def join(self, grids: list[ScaleGrid]) -> BlockGrid:
        """Grids of consecutive rows as one."""
        parts = [grid for grid in grids if isinstance(grid, BlockGrid)]
        minima = [grid.m for grid in parts if grid.m is not None]
        return BlockGrid(torch.cat([grid.d for grid in parts]), torch.cat(minima) if minima else None, self.steps)

    def pack_blocks(self, codes: np.ndarray, grid: ScaleGrid) -> np.ndarray:
        """[n, block_bytes] uint8."""
        if not isinstance(grid, BlockGrid):
            raise ValueError(f"the grid was not fitted for {self.name}")
        scales = [half.cpu().reshape(-1, 1).numpy() for half in (grid.d, grid.m) if half is not None]
        return np.concatenate([*map(bits.half_bytes, scales), self.pack_codes(codes)], axis=1)

    def unpack_blocks(self, packed: np.ndarray, rows: int) -> tuple[np.ndarray, BlockGrid]:
        """Codes [n, 32] uint8 and the grid."""
        head = 4 if self.has_minimum else 2
        halves = torch.from_numpy(bits.bytes_half(packed[:, :head])).reshape(rows, -1, head // 2)
        minima = halves[..., 1].contiguous() if self.has_minimum else None
        grid = BlockGrid(halves[..., 0].contiguous(), minima, self.steps)
        return self.unpack_codes(packed[:, head:]), grid
