"""GGUF blocks of 32 numbers: q8_0, q4_0, q4_1, q5_0, q5_1, iq4_nl."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmpack.encodings import bits, tiles
from llmpack.encodings.blocks import BlockEncoding
from llmpack.encodings.search import quotient
from llmpack.encodings.steps import Steps

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    np = LazyModule("numpy")
    torch = LazyModule("torch")

IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
IQ4_STEPS = Steps(-127, 113, IQ4_TABLE)


class _Nibbles(BlockEncoding):
    """Codes of four bits: the first half of the block in the low nibbles, the second in the high ones."""

    def pack_codes(self, codes: np.ndarray) -> np.ndarray:
        """[n, 16] uint8."""
        return bits.pack_fields(codes, 4, 16)

    def unpack_codes(self, packed: np.ndarray) -> np.ndarray:
        """[n, 32] uint8."""
        return bits.unpack_fields(packed, 4, 16)


class _FiveBits(BlockEncoding):
    """Codes of five bits: the highest bits in the first four bytes, in order, then nibbles."""

    def pack_codes(self, codes: np.ndarray) -> np.ndarray:
        """[n, 20] uint8."""
        high = bits.pack_fields(codes >> np.uint8(4), 1, 1)
        return np.concatenate([high, bits.pack_fields(codes & np.uint8(15), 4, 16)], axis=1)

    def unpack_codes(self, packed: np.ndarray) -> np.ndarray:
        """[n, 32] uint8."""
        high = bits.unpack_fields(packed[:, :4], 1, 1)
        codes: np.ndarray = bits.unpack_fields(packed[:, 4:], 4, 16) | (high << np.uint8(4))
        return codes


class Q4_0(_Nibbles):
    """``d * (code - 8)``."""

    name, ggml_type, block_bytes = "q4_0", 2, 18
    steps = Steps(-8, 7)
    reach = 8


class Q4_1(_Nibbles):
    """``d * code + m``."""

    name, ggml_type, block_bytes = "q4_1", 3, 20
    steps = Steps(0, 15)
    reach = 1
    has_minimum = True


class Q5_0(_FiveBits):
    """``d * (code - 16)``."""

    name, ggml_type, block_bytes = "q5_0", 6, 22
    steps = Steps(-16, 15)
    reach = 16


class Q5_1(_FiveBits):
    """``d * code + m``."""

    name, ggml_type, block_bytes = "q5_1", 7, 24
    steps = Steps(0, 31)
    reach = 1
    has_minimum = True


class IQ4_NL(_Nibbles):
    """``d * table[code]`` with sixteen unequally spaced entries."""

    name, ggml_type, block_bytes = "iq4_nl", 20, 18
    steps = IQ4_STEPS
    reach = 127


class Q8_0(BlockEncoding):
    """``d * (code - 128)``; the file holds ``code - 128`` as int8.

    Without importance the bytes of `encode` are those of llama.cpp's reference, which rounds by the scale before that
    is rounded to float16; with it, the scale is searched.
    """

    name, ggml_type, block_bytes = "q8_0", 8, 34
    steps = Steps(-128, 127)
    reach = 127

    def encode(self, W: Tensor, importance: Tensor | None = None) -> np.ndarray:
        """[rows, row bytes] uint8."""
        if importance is not None:
            return super().encode(W, importance)
        values, _ = self.checked(W, None)
        rows, columns = values.shape
        packed = np.empty((rows, self.row_bytes(columns)), dtype=np.uint8)
        for run in tiles.runs(rows, columns, tiles.SLAB):
            x = values[run].reshape(-1, self.block)
            scale = x.abs().amax(1, keepdim=True) / 127
            ratio = x * quotient(torch.ones_like(scale), scale)
            whole = ratio.trunc()
            rounded = whole + ((ratio - whole) * 2).trunc_()  # half away from zero, as C's roundf
            codes = rounded.to(torch.int8).cpu().numpy().view(np.uint8)
            halves = bits.half_bytes(scale.to(torch.float16).cpu().numpy())
            packed[run] = np.concatenate([halves, codes], axis=1).reshape(-1, packed.shape[1])
        return packed

    def pack_codes(self, codes: np.ndarray) -> np.ndarray:
        """[n, 32] uint8: the bytes of int8."""
        signed: np.ndarray = codes ^ np.uint8(128)
        return signed

    def unpack_codes(self, packed: np.ndarray) -> np.ndarray:
        """[n, 32] uint8."""
        codes: np.ndarray = packed ^ np.uint8(128)
        return codes
