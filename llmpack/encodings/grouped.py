"""Int groups of the GPTQ layout: codes of 2, 3, 4 or 8 bits, a float16 scale and perhaps a zero per group of columns.

``value = scale * (code - zero)``; the zero of a symmetric encoding is the middle code. A group is a block here, so that
rows stay independent and a family may permute them: codes, then the scale, then the zero as one byte. The words of the
file (``qweight``, ``qzeros``, ``scales``), which run across rows, are made when it is written.

Scales are fixed before the first column is rounded. So columns are rounded in any order and still lie where they are:
``g_idx`` of the file is ``column // group``, whatever the order (static groups). Groups of columns that are no
neighbours are those of `llmpack.encodings.ordered`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from llmpack.encodings import bits
from llmpack.encodings.blocks import BlockwiseEncoding
from llmpack.encodings.grids import BlockGrid, ScaleGrid, ZeroGrid
from llmpack.encodings.names import INT_NAMES, ORDERED_NAMES, int_options
from llmpack.encodings.refit import Descent, descend_halves
from llmpack.encodings.search import Groups, symmetric, to_unit
from llmpack.encodings.steps import Steps
from llmpack.encodings.zeros import ZeroGroups, with_zero

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

WORD = 32
"""Rows are a multiple of it: so many codes of any width are whole words."""


class IntGroups(BlockwiseEncoding):
    """Int codes with a scale per group.

    bits         of a code
    group        columns that share a scale; -1 is the whole row
    is_symmetric zero is the middle code everywhere
    """

    ggml_type = None
    bits: ClassVar[int]
    is_symmetric: ClassVar[bool]

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage per number; the scale of a whole row, whose share depends on its length, is left out."""
        return float(self.bits) if self.group < 0 else super().bits_per_weight

    def group_in(self, columns: int) -> int:
        """Columns that share a scale in rows of that length."""
        return columns if self.group < 0 else self.group

    def block_in(self, columns: int) -> int:
        """A group is a block."""
        return self.group_in(columns)

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row. Raises ValueError where `problem` has something to say."""
        nbytes = super().row_bytes(columns)
        return nbytes + self._head if self.group < 0 else nbytes

    def fit_rows(self, x: Tensor, w: Tensor, rows: int) -> ScaleGrid:
        """The grid of a few rows."""
        if self.is_symmetric:
            return self._grid(symmetric(Groups(x, w, self.steps), to_unit)[0].view(rows, -1), None, len(x))
        scales, zeros, _ = with_zero(ZeroGroups(x, w, self.steps), to_unit)
        return self._grid(scales.view(rows, -1), zeros.view(rows, -1), len(x))

    def refit_rows(self, grid: ScaleGrid, descent: Descent) -> ScaleGrid:
        """The grid of a few rows, its scales moved down the full Hessian; zeros stay."""
        (scales,) = descend_halves(descent, [grid.scales.T])
        return grid.holding((scales.T.to(torch.float16).contiguous(), *grid.stored[1:]))

    def pack_blocks(self, codes: np.ndarray, grid: ScaleGrid) -> np.ndarray:
        """[n, bytes of a group] uint8."""
        d, zeros = (None if part is None else part.cpu().reshape(-1, 1).numpy() for part in grid.stored)
        if d is None:
            raise AssertionError("a grid has scales")
        parts = [pack_codes(codes, self.bits), bits.half_bytes(d)]
        return np.concatenate(parts if zeros is None else [*parts, zeros], axis=1)

    def unpack_blocks(self, packed: np.ndarray, rows: int) -> tuple[np.ndarray, ScaleGrid]:
        """Codes [n, columns of a group] uint8 and the grid."""
        end = packed.shape[1] - self._head
        codes = unpack_codes(packed[:, :end], self.bits)
        d = torch.from_numpy(bits.bytes_half(packed[:, end : end + 2].copy())).reshape(rows, -1)
        zeros = None if self.is_symmetric else torch.from_numpy(packed[:, end + 2].copy()).reshape(rows, -1)
        return codes, self._grid(d, zeros, codes.shape[1])

    def owns(self, grid: ScaleGrid) -> bool:
        """Whether it stores codes on a grid of that kind."""
        return super().owns(grid) and isinstance(grid, BlockGrid if self.is_symmetric else ZeroGrid)

    @property
    def _head(self) -> int:
        """Bytes of a group's scale and zero."""
        return 2 if self.is_symmetric else 3

    def _grid(self, d: Tensor, zeros: Tensor | None, group: int) -> ScaleGrid:
        halves = d.to(torch.float16).contiguous()
        if zeros is None:
            return BlockGrid(halves, None, self.steps, group)
        return ZeroGrid(halves, zeros.to(torch.uint8).contiguous(), self.steps, group)


def pack_codes(codes: np.ndarray, width: int) -> np.ndarray:
    """Codes of 2, 3, 4 or 8 bits, [n, count] uint8 with count a multiple of 32, as [n, count * width / 8] uint8.

    Codes of 3 bits are their low two, then their highest.
    """
    if width == 8:
        return codes
    if width == 3:
        low, high = codes & np.uint8(3), codes >> np.uint8(2)
        return np.concatenate([bits.pack_fields(low, 2, 8), bits.pack_fields(high, 1, 4)], axis=1)
    return bits.pack_fields(codes, width, 4 * width)


def unpack_codes(packed: np.ndarray, width: int) -> np.ndarray:
    """Inverse of `pack_codes`."""
    if width == 8:
        return packed
    if width == 3:
        middle = packed.shape[1] * 2 // 3
        high = bits.unpack_fields(packed[:, middle:], 1, 4)
        codes: np.ndarray = bits.unpack_fields(packed[:, :middle], 2, 8) | (high << np.uint8(2))
        return codes
    return bits.unpack_fields(packed, width, 4 * width)


def _made(name: str) -> type[IntGroups]:
    """The encoding of that name."""
    width, group, middle, _ = int_options(name)
    shared = "a whole row" if group < 0 else f"{group} columns"
    zero = f"d * (code - {1 << (width - 1)})" if middle else "d * (code - zero)"
    half = 1 << (width - 1)
    head, columns = (2 if middle else 3), (WORD if group < 0 else group)
    body = {
        "__doc__": f"``{zero}``, {width} bits, a scale for {shared} (GPTQ).",
        "__module__": __name__,
        "name": name,
        "bits": width,
        "group": group,
        "is_symmetric": middle,
        "steps": Steps(-half, half - 1) if middle else Steps(0, 2 * half - 1),
        "reach": max(1, half - 1),
        "block": columns,
        "block_bytes": columns * width // 8 + (0 if group < 0 else head),
    }
    return type(name, (IntGroups,), body)


globals().update({name: _made(name) for name in INT_NAMES if name not in ORDERED_NAMES})
