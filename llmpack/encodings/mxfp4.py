"""mxfp4: blocks of 32 numbers of four bits with a power of two as their scale (OCP Microscaling Formats 1.0).

A code is a sign and a float of three bits (e2m1), so the multiples of a scale are 0, 1, 2, 3, 4, 6, 8 and 12 halves.
GGUF stores a block as the exponent of the scale (e8m0), then nibbles.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from llmpack.encodings import bits
from llmpack.encodings.blocks import BlockwiseEncoding
from llmpack.encodings.grids import ScaleGrid, Stored
from llmpack.encodings.refit import Descent
from llmpack.encodings.search import Groups, pick_least
from llmpack.encodings.steps import Steps

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

TABLE = (-12, -8, -6, -4, -3, -2, -1, 0, 0, 1, 2, 3, 4, 6, 8, 12)
"""Twice what codes mean, ascending; zero has two codes. The file has the positive half first, each from zero up."""
_NIBBLES = np.array([15, 14, 13, 12, 11, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7], dtype=np.uint8)
_CODES = np.argsort(_NIBBLES).astype(np.uint8)

BIAS = 128
"""The byte of an exponent k is ``k + BIAS``: llama.cpp halves the scale, as its table is doubled."""
LOWEST, HIGHEST = -127, 126
"""Exponents that are searched: those whose reciprocals are numbers in float32 too."""
TRIED = (0, 1, -1, -2, -3, -4)
"""Exponents tried, from that with which the largest number of a block needs codes of 8 or 12."""


@dataclass(frozen=True, eq=False)
class PowerGrid(ScaleGrid):
    """A power of two per block of columns.

    exponents  [rows, blocks] uint8, as in the file
    """

    exponents: Tensor
    steps: Steps
    group: int

    @cached_property
    def scales(self) -> Tensor:
        """[rows, blocks] float32."""
        return _power(self.exponents.to(torch.int32) - BIAS)

    @property
    def offsets(self) -> Tensor | None:
        """None."""
        return None

    @property
    def stored(self) -> Stored:
        """The exponents."""
        return (self.exponents,)

    def holding(self, stored: Stored) -> PowerGrid:
        """The grid of other exponents."""
        (exponents,) = stored
        if exponents is None:
            raise ValueError("a grid of powers has exponents")
        return PowerGrid(exponents, self.steps, self.group)


class MXFP4(BlockwiseEncoding):
    """``2^k * table[code]``: a byte of exponent, then codes of four bits.

    reach  numbers up to 2^60, so that sums of their squares are numbers too
    """

    name, ggml_type, block, block_bytes = "mxfp4", 39, 32, 17
    group = 32
    steps = Steps(-12, 12, TABLE)
    reach = 1 << 44

    def fit_rows(self, x: Tensor, w: Tensor, rows: int) -> ScaleGrid:
        """The grid of a few rows: of all powers near the largest number, that of least weighted error."""
        top = x.abs().amax(0)
        near = torch.frexp(top).exponent - 4  # top / 2^near is 8 or more and less than 16
        tried = tuple(_power((near + step).clamp(LOWEST, HIGHEST)) for step in TRIED)
        scales = pick_least(Groups(x, w, self.steps), tried)[0]
        return self._grid(torch.where(top == 0, -BIAS, _exponent(scales)).view(rows, -1))

    def refit_rows(self, grid: ScaleGrid, descent: Descent) -> ScaleGrid:
        """The grid of a few rows, its scales moved down the full Hessian."""
        found = grid.scales.T.clone()
        for run in descent.runs():
            for g in run.groups:
                found[g] = run.scale(g, found[g], _nearest_power)
        return self._grid(_exponent(found.T))

    def pack_blocks(self, codes: np.ndarray, grid: ScaleGrid) -> np.ndarray:
        """[n, 17] uint8."""
        (exponents,) = grid.stored
        if exponents is None:
            raise ValueError(f"the grid was not fitted for {self.name}")
        return np.concatenate(
            [exponents.cpu().reshape(-1, 1).numpy(), bits.pack_fields(_NIBBLES[codes], 4, 16)], axis=1
        )

    def unpack_blocks(self, packed: np.ndarray, rows: int) -> tuple[np.ndarray, ScaleGrid]:
        """Codes [n, 32] uint8 and the grid."""
        exponents = torch.from_numpy(packed[:, 0].copy()).reshape(rows, -1)
        return _CODES[bits.unpack_fields(packed[:, 1:], 4, 16)], PowerGrid(exponents, self.steps, self.group)

    def _grid(self, exponents: Tensor) -> PowerGrid:
        return PowerGrid((exponents + BIAS).to(torch.uint8).contiguous(), self.steps, self.group)


def _power(exponents: Tensor) -> Tensor:
    """``2^exponents`` float32, exact; from -128, of which float32 keeps a few bits only, to 127."""
    small = torch.full_like(exponents, 1 << 21) << (exponents + BIAS).clamp(0, 1)
    return torch.where(exponents > -127, (exponents + 127) << 23, small).view(torch.float32)


def _exponent(powers: Tensor) -> Tensor:
    """int32, inverse of `_power`."""
    return torch.frexp(powers).exponent - 1


def _nearest_power(wanted: Tensor) -> Tensor:
    """The power of two nearest to what is wanted; the least one where nothing positive is."""
    below = torch.frexp(wanted).exponent - 1
    below = torch.where(wanted >= 1.5 * _power(below.clamp(LOWEST, HIGHEST)), below + 1, below)
    return _power(torch.where(wanted > 0, below, LOWEST).clamp(LOWEST, HIGHEST))
