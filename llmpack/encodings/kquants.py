"""GGUF super-blocks of 256 numbers: q2_k, q3_k, q4_k, q5_k, q6_k, iq4_xs."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llmpack.encodings import bits
from llmpack.encodings.blocks import BlockwiseEncoding
from llmpack.encodings.grids import ScaleGrid, SuperGrid
from llmpack.encodings.legacy import IQ4_STEPS
from llmpack.encodings.nested import nested_affine, nested_symmetric
from llmpack.encodings.refit import Descent, descend_integers
from llmpack.encodings.search import Groups
from llmpack.encodings.steps import Steps

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    np = LazyModule("numpy")
    torch = LazyModule("torch")


@dataclass(frozen=True)
class Fields:
    """A run of super-blocks as arrays of [n, ...]: halves float16 (d, then dmin), the others uint8.

    factors, minima  of groups, as non-negative numbers: signed ones have the lowest added
    """

    codes: np.ndarray
    halves: np.ndarray
    factors: np.ndarray
    minima: np.ndarray | None = None


class SuperBlockEncoding(BlockwiseEncoding):
    """Groups of 16 or 32 with small integer scales, float16 units per super-block.

    integers     what a group's factor may be (and its minimum, where there is one)
    has_minimum  ``d * factor * multiple - dmin * minimum``; without one, ``d * factor * multiple``
    """

    block = 256
    integers: ClassVar[Steps]
    has_minimum: ClassVar[bool] = False

    @abstractmethod
    def to_bytes(self, fields: Fields) -> list[np.ndarray]:
        """The parts of the blocks, uint8 [n, ...] each, in order."""

    @abstractmethod
    def from_bytes(self, packed: np.ndarray) -> Fields:
        """Inverse of `to_bytes`, of joined parts."""

    def fit_rows(self, x: Tensor, w: Tensor, rows: int) -> ScaleGrid:
        """The grid of a few rows."""
        groups, per = Groups(x, w, self.steps), self.block // self.group
        found = (nested_affine if self.has_minimum else nested_symmetric)(groups, per, self.integers)
        return self._grid(rows, found.units, found.integers)

    def refit_rows(self, grid: ScaleGrid, descent: Descent) -> ScaleGrid:
        """The grid of a few rows, its integers and units moved down the full Hessian."""
        halves, small = grid.stored[:2], grid.stored[2:]
        units = [
            half.T.to(torch.float32) * sign for half, sign in zip(halves, (1, -1), strict=True) if half is not None
        ]
        integers = [part.T.to(torch.float32) for part in small if part is not None]
        found, whole = descend_integers(descent, units, integers, self.integers.low, self.integers.high)
        signed = [part.T * sign for part, sign in zip(found, (1, -1), strict=False)]
        return self._grid(grid.rows, tuple(signed), tuple(part.T for part in whole))

    def pack_blocks(self, codes: np.ndarray, grid: ScaleGrid) -> np.ndarray:
        """[n, block_bytes] uint8."""
        d, dmin, factors, minima = grid.stored
        if d is None or factors is None:
            raise ValueError(f"the grid was not fitted for {self.name}")
        halves = np.stack([half.cpu().numpy().reshape(-1) for half in (d, dmin) if half is not None], axis=1)
        low, per = self.integers.low, self.block // self.group
        small = [
            None if part is None else (part.cpu().numpy().reshape(-1, per) - low).astype(np.uint8)
            for part in (factors, minima)
        ]
        if small[0] is None:
            raise ValueError(f"the grid was not fitted for {self.name}")
        return np.concatenate(self.to_bytes(Fields(codes, halves, small[0], small[1])), axis=1)

    def unpack_blocks(self, packed: np.ndarray, rows: int) -> tuple[np.ndarray, ScaleGrid]:
        """Codes [n, 256] uint8 and the grid."""
        fields = self.from_bytes(packed)
        units = torch.from_numpy(np.ascontiguousarray(fields.halves)).unbind(1)
        integers = [
            torch.from_numpy(part.astype(np.int16) + np.int16(self.integers.low))
            for part in (fields.factors, fields.minima)
            if part is not None
        ]
        return fields.codes, self._grid(rows, units, tuple(integers))

    def _grid(self, rows: int, units: tuple[Tensor, ...], integers: tuple[Tensor, ...]) -> SuperGrid:
        halves = [unit.to(torch.float16).reshape(rows, -1).contiguous() for unit in units]
        small = [whole.to(torch.int16).reshape(rows, -1).contiguous() for whole in integers]
        if self.has_minimum:
            return SuperGrid(halves[0], halves[1], small[0], small[1], self.steps, self.group)
        return SuperGrid(halves[0], None, small[0], None, self.steps, self.group)


class Q2_K(SuperBlockEncoding):
    """``d * factor * code - dmin * minimum``, all but the units of 4 and 2 bits.

    16 bytes of factors (low nibbles) and minima, 64 of codes, d, dmin.
    """

    name, ggml_type, block_bytes = "q2_k", 10, 84
    group, steps, integers, has_minimum = 16, Steps(0, 3), Steps(0, 15), True
    reach = 15

    def to_bytes(self, fields: Fields) -> list[np.ndarray]:
        """Pairs, codes, units."""
        if fields.minima is None:
            raise ValueError("q2_k has minima")
        pairs = fields.factors | (fields.minima << np.uint8(4))
        return [pairs, bits.pack_fields(fields.codes, 2, 32), bits.half_bytes(fields.halves)]

    def from_bytes(self, packed: np.ndarray) -> Fields:
        """Codes, units, factors, minima."""
        pairs, codes, halves = np.split(packed, [16, 80], axis=1)
        low, high = pairs & np.uint8(15), pairs >> np.uint8(4)
        return Fields(bits.unpack_fields(codes, 2, 32), bits.bytes_half(halves), low, high)


class Q3_K(SuperBlockEncoding):
    """``d * factor * (code - 4)`` with factors of -32 .. 31.

    32 bytes of the codes' high bits, 64 of low bits, 12 of factors (low nibbles, then top bits), d.
    """

    name, ggml_type, block_bytes = "q3_k", 11, 110
    group, steps, integers = 16, Steps(-4, 3), Steps(-32, 31)
    reach = 96

    def to_bytes(self, fields: Fields) -> list[np.ndarray]:
        """High bits, low bits, factors, unit."""
        low = bits.pack_fields(fields.factors & np.uint8(15), 4, 8)
        top = bits.pack_fields(fields.factors >> np.uint8(4), 2, 4)
        high = bits.pack_fields(fields.codes >> np.uint8(2), 1, 32)
        return [high, bits.pack_fields(fields.codes & np.uint8(3), 2, 32), low, top, bits.half_bytes(fields.halves)]

    def from_bytes(self, packed: np.ndarray) -> Fields:
        """Codes, unit, factors."""
        high, codes, low, top, halves = np.split(packed, [32, 96, 104, 108], axis=1)
        factors = bits.unpack_fields(low, 4, 8) | (bits.unpack_fields(top, 2, 4) << np.uint8(4))
        whole = bits.unpack_fields(codes, 2, 32) | (bits.unpack_fields(high, 1, 32) << np.uint8(2))
        return Fields(whole, bits.bytes_half(halves), factors)


class Q4_K(SuperBlockEncoding):
    """``d * factor * code - dmin * minimum`` with integers of 6 bits: d, dmin, 12 bytes of pairs, codes."""

    name, ggml_type, block_bytes = "q4_k", 12, 144
    group, steps, integers, has_minimum = 32, Steps(0, 15), Steps(0, 63), True
    reach = 63

    def to_bytes(self, fields: Fields) -> list[np.ndarray]:
        """Units, pairs, codes."""
        if fields.minima is None:
            raise ValueError(f"{self.name} has minima")
        pairs = bits.pack_six_bit_pairs(fields.factors, fields.minima)
        return [bits.half_bytes(fields.halves), pairs, *self.code_bytes(fields.codes)]

    def from_bytes(self, packed: np.ndarray) -> Fields:
        """Codes, units, factors, minima."""
        halves, pairs, codes = np.split(packed, [4, 16], axis=1)
        factors, minima = bits.unpack_six_bit_pairs(pairs)
        return Fields(self.bytes_codes(codes), bits.bytes_half(halves), factors, minima)

    def code_bytes(self, codes: np.ndarray) -> list[np.ndarray]:
        """The bytes that follow the scales."""
        return [bits.pack_fields(codes, 4, 32)]

    def bytes_codes(self, packed: np.ndarray) -> np.ndarray:
        """Inverse of `code_bytes`, of joined parts."""
        return bits.unpack_fields(packed, 4, 32)


class Q5_K(Q4_K):
    """As q4_k with codes of 5 bits: the high bits in 32 bytes before the low ones."""

    name, ggml_type, block_bytes = "q5_k", 13, 176
    steps = Steps(0, 31)

    def code_bytes(self, codes: np.ndarray) -> list[np.ndarray]:
        """The bytes that follow the scales."""
        return [bits.pack_fields(codes >> np.uint8(4), 1, 32), bits.pack_fields(codes & np.uint8(15), 4, 32)]

    def bytes_codes(self, packed: np.ndarray) -> np.ndarray:
        """Inverse of `code_bytes`, of joined parts."""
        high = bits.unpack_fields(packed[:, :32], 1, 32)
        codes: np.ndarray = bits.unpack_fields(packed[:, 32:], 4, 32) | (high << np.uint8(4))
        return codes


class Q6_K(SuperBlockEncoding):
    """``d * factor * (code - 32)`` with factors of -128 .. 127: low nibbles, high bits, factors as int8, d."""

    name, ggml_type, block_bytes = "q6_k", 14, 210
    group, steps, integers = 16, Steps(-32, 31), Steps(-128, 127)
    reach = 127 * 31

    def to_bytes(self, fields: Fields) -> list[np.ndarray]:
        """Nibbles, high bits, factors, unit."""
        low = bits.pack_fields(fields.codes & np.uint8(15), 4, 64)
        high = bits.pack_fields(fields.codes >> np.uint8(4), 2, 32)
        return [low, high, fields.factors ^ np.uint8(128), bits.half_bytes(fields.halves)]

    def from_bytes(self, packed: np.ndarray) -> Fields:
        """Codes, unit, factors."""
        low, high, factors, halves = np.split(packed, [128, 192, 208], axis=1)
        codes = bits.unpack_fields(low, 4, 64) | (bits.unpack_fields(high, 2, 32) << np.uint8(4))
        return Fields(codes, bits.bytes_half(halves), factors ^ np.uint8(128))


class IQ4_XS(SuperBlockEncoding):
    """``d * factor * table[code]`` with factors of -32 .. 31: d, their top bits, their low nibbles, codes."""

    name, ggml_type, block_bytes = "iq4_xs", 23, 136
    group, steps, integers = 32, IQ4_STEPS, Steps(-32, 31)
    reach = 31 * 113

    def to_bytes(self, fields: Fields) -> list[np.ndarray]:
        """Unit, top bits, nibbles, codes."""
        top = bits.pack_fields(fields.factors >> np.uint8(4), 2, 1)
        low = bits.pack_fields(fields.factors & np.uint8(15), 4, 1)
        return [bits.half_bytes(fields.halves), top, low, bits.pack_fields(fields.codes, 4, 16)]

    def from_bytes(self, packed: np.ndarray) -> Fields:
        """Codes, unit, factors."""
        halves, top, low, codes = np.split(packed, [2, 4, 8], axis=1)
        factors = bits.unpack_fields(low, 4, 1) | (bits.unpack_fields(top, 2, 1) << np.uint8(4))
        return Fields(bits.unpack_fields(codes, 4, 16), bits.bytes_half(halves), factors)
