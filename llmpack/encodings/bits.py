"""Small unsigned numbers in bytes, the ways in which GGUF blocks hold them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
else:
    from llmpack.lazy import LazyModule

    np = LazyModule("numpy")


def pack_fields(values: np.ndarray, bits: int, span: int) -> np.ndarray:
    """Numbers of `bits` (1, 2 or 4) bits, [n, count] uint8, as [n, count * bits / 8] uint8.

    A run of ``8 // bits * span`` numbers fills `span` bytes: number ``s * span + b`` lies in byte b, shifted left by
    ``s * bits``. Higher bits of the values must be zero.
    """
    shifts = 8 // bits
    parts = values.reshape(values.shape[0], -1, shifts, span)
    packed = parts[:, :, 0].copy()
    for s in range(1, shifts):
        packed |= parts[:, :, s] << np.uint8(s * bits)
    return packed.reshape(values.shape[0], -1)


def unpack_fields(packed: np.ndarray, bits: int, span: int) -> np.ndarray:
    """Inverse of `pack_fields`."""
    shifts = 8 // bits
    parts = packed.reshape(packed.shape[0], -1, span)
    values = np.empty((*parts.shape[:2], shifts, span), dtype=np.uint8)
    for s in range(shifts):
        np.right_shift(parts, np.uint8(s * bits), out=values[:, :, s])
    values &= np.uint8((1 << bits) - 1)
    return values.reshape(packed.shape[0], -1)


def pack_six_bit_pairs(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Eight 6-bit scales and eight 6-bit minima, both [n, 8] uint8, in the 12 bytes of a q4_k or q5_k block.

    Bytes 0-3 hold scales 0-3 and, above them, the top two bits of scales 4-7; bytes 4-7 the same for the minima; bytes
    8-11 the low four bits of scales 4-7 and, above them, of minima 4-7.
    """
    low, top = np.uint8(15), np.uint8(48)
    head = scales[:, :4] | ((scales[:, 4:] & top) << np.uint8(2))
    middle = minima[:, :4] | ((minima[:, 4:] & top) << np.uint8(2))
    tail = (scales[:, 4:] & low) | ((minima[:, 4:] & low) << np.uint8(4))
    return np.concatenate([head, middle, tail], axis=1)


def unpack_six_bit_pairs(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `pack_six_bit_pairs`."""
    head, middle, tail = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    low, top, six = np.uint8(15), np.uint8(48), np.uint8(63)
    scales = np.concatenate([head & six, (tail & low) | ((head >> np.uint8(2)) & top)], axis=1)
    minima = np.concatenate([middle & six, (tail >> np.uint8(4)) | ((middle >> np.uint8(2)) & top)], axis=1)
    return scales, minima


def half_bytes(values: np.ndarray) -> np.ndarray:
    """float16 [n, k] as little-endian bytes, [n, 2 k] uint8."""
    return np.ascontiguousarray(values.astype("<f2", copy=False)).view(np.uint8)


def bytes_half(packed: np.ndarray) -> np.ndarray:
    """Inverse of `half_bytes`."""
    return np.ascontiguousarray(packed).view("<f2").astype(np.float16, copy=False)
