"""What an encoding is: the arithmetic side that quantizers use, the byte side that writers use.

Rounding is two-phase. ``grid = encoding.fit(W, importance)`` fixes every scale (and minimum) of the
whole tensor in the precision in which the file stores it. After that any columns can be rounded in
any order under ``grid.levels(columns)``; GPTQ, coordinate descent and plain rounding differ only in
the order and in what they do with the error. ``encoding.pack(codes, grid)`` gives the bytes of the
file, ``encoding.unpack`` is its exact inverse, so the packed rows *are* codes and grid: a step stores
them packed and nothing is lost or quantized twice.

Packed rows are independent: row r of a tensor is ``packed[r]``, so a family may permute, split or
join rows of a packed tensor (rotary permutation, fused projections) without decoding it.

Layouts: https://github.com/ggml-org/llama.cpp (ggml-common.h) for the block types.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llmpack.encodings import tiles
from llmpack.encodings.steps import lookup

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")


@dataclass(frozen=True)
class Levels:
    """The values that codes stand for, for every row and for some columns of a tensor.

    ``value = scale * (code - zero) + offset``, or ``scale * table[code] + offset`` with a table.

    scale   [rows, n] float32; may be negative or zero (then every code of that group means offset)
    zero    code that stands for zero: an int, or [rows, n] int tensor where it varies (int groups)
    offset  [rows, n] float32 or None
    high    largest code; the smallest is 0
    table   [high + 1] float32, ascending, or None for equally spaced levels
    """

    scale: Tensor
    high: int
    zero: int | Tensor = 0
    offset: Tensor | None = None
    table: Tensor | None = None

    def column(self, index: int | slice) -> Levels:
        """The levels of one column ([rows] tensors), or of a slice of the columns held here."""
        return Levels(
            scale=self.scale[:, index],
            high=self.high,
            zero=self.zero if isinstance(self.zero, int) else self.zero[:, index],
            offset=None if self.offset is None else self.offset[:, index],
            table=self.table,
        )

    def round(self, values: Tensor) -> Tensor:
        """Nearest codes of `values` (shape of `scale`, any float dtype), int32."""
        x = values if self.offset is None else values - self.offset
        return self.nearest(x / self.divisor)

    @property
    def divisor(self) -> Tensor:
        """The scale to divide by: where it is 0 everything is 0 of it."""
        return torch.where(self.scale == 0, torch.inf, self.scale)

    def nearest(self, ratio: Tensor) -> Tensor:
        """Nearest codes, int32, of what `round` has divided by the scale; `ratio` is overwritten."""
        if self.table is not None:
            return _nearest(ratio, self.table)
        return (torch.round(ratio) + self.zero).clamp_(0, self.high).to(torch.int32)

    @property
    def ends(self) -> tuple[Any, Any]:
        """Least and largest multiple of the scale where there is no table; tensors where `zero` varies."""
        return -self.zero, self.high - self.zero

    def codes_of(self, multiples: Tensor) -> Tensor:
        """Codes, uint8, of multiples of the scale that codes stand for."""
        if self.table is None:
            return (multiples + self.zero).to(torch.uint8)
        return torch.bucketize(multiples, self.table.to(multiples.dtype)).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Values of `codes`, in the dtype of `scale`; the same float operations as llama.cpp's."""
        steps = (
            codes.to(self.scale.dtype) - self.zero
            if self.table is None
            else self.table[codes.long()].to(self.scale.dtype)
        )
        values = self.scale * steps
        return values if self.offset is None else values + self.offset

    def to(self, dtype: torch.dtype) -> Levels:
        """The same levels in another float precision (float64 for reference runs)."""
        return Levels(
            scale=self.scale.to(dtype),
            high=self.high,
            zero=self.zero,
            offset=None if self.offset is None else self.offset.to(dtype),
            table=None if self.table is None else self.table.to(dtype),
        )


def _nearest(ratio: Tensor, table: Tensor) -> Tensor:
    """Codes int32 of the nearest entries of an ascending table; a middle belongs to the lower one."""
    entries = lookup(tuple(table.tolist()))
    if entries is None:
        middles = (table[1:] + table[:-1]) / 2
        return torch.bucketize(ratio.contiguous(), middles.to(ratio.dtype), out_int32=True)
    index = entries.index(ratio).to(torch.int32)
    return torch.index_select(entries.codes.to(ratio.device), 0, index.reshape(-1)).view(index.shape)


class Grid(ABC):
    """Every scale of one tensor, fixed, in the precision of the file. Never changed, only replaced."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """Rows of the tensor."""

    @property
    @abstractmethod
    def columns(self) -> int:
        """Columns of the tensor."""

    @property
    @abstractmethod
    def group_of(self) -> Tensor:
        """[columns] int64: which scale group owns a column."""

    @abstractmethod
    def levels(self, columns: Tensor | slice | None = None) -> Levels:
        """Dense levels of the columns (all, in order, for None); float32."""

    @abstractmethod
    def select_rows(self, rows: Tensor | slice) -> Grid:
        """The grid of some rows, in the order given."""


@dataclass(frozen=True)
class Quantized:
    """A tensor in flight: codes [rows, columns] (uint8 or int32), their grid, and the encoding of both."""

    codes: Tensor
    grid: Grid
    encoding: GridEncoding

    def decode(self) -> Tensor:
        """[rows, columns] float32, exactly what the runtime will see."""
        values = torch.empty(self.codes.shape, device=self.codes.device)
        for run in tiles.runs(self.codes.shape[0], self.codes.shape[1], tiles.SLAB):
            values[run] = self.grid.select_rows(run).levels().decode(self.codes[run].to(torch.int32))
        return values

    def pack(self) -> np.ndarray:
        """[rows, bytes per row] uint8."""
        return self.encoding.pack(self.codes, self.grid)


class Encoding(ABC):
    """How one tensor's numbers are stored.

    name         as recipes spell it
    ggml_type    the type id in a GGUF file, None where GGUF has no such type
    block        columns per block: a row is a whole number of blocks
    block_bytes  bytes of one block
    """

    name: ClassVar[str]
    ggml_type: ClassVar[int | None]
    block: ClassVar[int]
    block_bytes: ClassVar[int]
    version: ClassVar[int] = 1

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage per number, scales included."""
        return 8 * self.block_bytes / self.block

    def problem(self, columns: int) -> str | None:
        """Why rows of that length cannot be stored, or None."""
        if columns % self.block:
            return f"rows of {columns} are not a multiple of {self.name}'s block of {self.block}"
        return None

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row. Raises ValueError where `problem` has something to say."""
        problem = self.problem(columns)
        if problem:
            raise ValueError(problem)
        return columns // self.block * self.block_bytes

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of that shape; needs no data."""
        return math.prod(shape[:-1]) * self.row_bytes(shape[-1])

    @abstractmethod
    def encode(self, W: Tensor, importance: Tensor | None = None) -> np.ndarray:
        """Round `W` [rows, columns] without error compensation; [rows, row bytes] uint8."""

    @abstractmethod
    def decode(self, packed: np.ndarray, columns: int) -> Tensor:
        """[rows, columns] float32 of packed rows."""


class GridEncoding(Encoding):
    """An encoding with codes on a grid: what quantizers work with.

    joint_columns  columns that one code spans (1 for all scalar grids)
    """

    joint_columns: ClassVar[int] = 1

    @abstractmethod
    def fit(self, W: Tensor, importance: Tensor | None = None) -> Grid:
        """Every scale of `W` [rows, columns] float32, already rounded to the file's precision.

        importance  [columns] float32, mean squared input of each column (the Hessian's diagonal up
                    to a factor), or None for equal weights.
        """

    @abstractmethod
    def refit(self, codes: Tensor, grid: Grid, W: Tensor, H: Tensor) -> Grid:
        """Scales that lower ``tr((W - Q) H (W - Q)^T)`` with the codes held; a new grid.

        Row by row never worse than `grid`, under the stored precision.

        codes  [rows, columns] int, rounded on `grid`
        H      [columns, columns] float32, ``E[x x^T]`` of the inputs
        """

    @abstractmethod
    def pack(self, codes: Tensor, grid: Grid) -> np.ndarray:
        """[rows, row bytes] uint8."""

    @abstractmethod
    def unpack(self, packed: np.ndarray, columns: int) -> tuple[Tensor, Grid]:
        """Exact inverse of `pack`: codes [rows, columns] int32 and the grid."""

    def round(self, W: Tensor, grid: Grid) -> Quantized:
        """Nearest codes under a grid."""
        return Quantized(grid.levels().round(W), grid, self)

    def encode(self, W: Tensor, importance: Tensor | None = None) -> np.ndarray:
        """Round to nearest on a grid fitted with `importance`."""
        return self.round(W, self.fit(W, importance)).pack()

    def decode(self, packed: np.ndarray, columns: int) -> Tensor:
        """[rows, columns] float32 of packed rows, some at a time."""
        rows = tiles.packed_matrix(packed, self, columns)
        values = torch.empty(rows.shape[0], columns)
        for run in tiles.runs(rows.shape[0], columns, tiles.SLAB):
            codes, grid = self.unpack(rows[run], columns)
            values[run] = grid.levels().decode(codes)
        return values
