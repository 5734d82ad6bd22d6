"""The words of the GPTQ layout: codes and zeros of 2, 3, 4 or 8 bits in int32, as auto-gptq and GPTQModel read them.

The codes of 32 rows lie in `bits` words as one stream of bits, the lowest first. For 2, 4 and 8 bits that is 16, 8 and
4 codes a word; of 3 bits the eleventh and the twenty-second code lie across two words.

A matrix of R outputs and C inputs in G groups:

    qweight  int32 [C * bits / 32, R]   codes; 32 inputs of one output make `bits` words
    qzeros   int32 [G, R * bits / 32]   zeros; 32 outputs of one group make `bits` words
    scales   float16 [G, R]
    g_idx    int32 [C]                  the group of each input
    value    scales[g, r] * (code - zero)

Version 1 (``checkpoint_format = "gptq"``) stores zeros less one, version 2 (``"gptq_v2"``) as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

RUN = 32
"""Numbers that fill whole words, whatever their bits."""


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [n, m] below ``2 ** bits`` as int32 [n * bits / 32, m]: runs of 32 rows become `bits` rows of words.

    Raises ValueError where n is not a multiple of 32.
    """
    count, width = codes.shape
    if count % RUN:
        raise ValueError(f"{count} rows are not a multiple of {RUN}")
    runs = codes.reshape(-1, RUN, width)
    words = np.zeros((len(runs), bits, width), dtype=np.uint32)
    for k in range(RUN):
        word, shift = divmod(k * bits, 32)
        one = runs[:, k].astype(np.uint32)
        words[:, word] |= one << np.uint32(shift)
        if shift + bits > 32:
            words[:, word + 1] |= one >> np.uint32(32 - shift)
    return words.reshape(-1, width).view(np.int32)


def unpack_words(words: np.ndarray, bits: int) -> np.ndarray:
    """Inverse of `pack_words`: uint8 [n, m] of int32 [n * bits / 32, m]. Raises ValueError for part of a run."""
    count, width = words.shape
    if count % bits:
        raise ValueError(f"{count} rows of words are not a multiple of {bits}")
    runs = np.ascontiguousarray(words).view(np.uint32).reshape(-1, bits, width)
    codes = np.empty((len(runs), RUN, width), dtype=np.uint8)
    mask = np.uint32((1 << bits) - 1)
    for k in range(RUN):
        word, shift = divmod(k * bits, 32)
        one = runs[:, word] >> np.uint32(shift)
        if shift + bits > 32:
            one = one | runs[:, word + 1] << np.uint32(32 - shift)
        codes[:, k] = one & mask
    return codes.reshape(-1, width)


def pack_zeros(zeros: np.ndarray, bits: int, version: int) -> np.ndarray:
    """``qzeros`` int32 [G, R * bits / 32] of zeros, integers [R, G].

    Raises ValueError for a zero of 0 in version 1: less one it would be read as ``2 ** bits``, or change its neighbour.
    """
    if version == 1 and int(zeros.min()) < 1:
        raise ValueError("version 1 of the GPTQ layout has no zero of 0; write version 2")
    stored = (zeros - 1 if version == 1 else zeros).astype(np.uint8)
    return np.ascontiguousarray(pack_words(stored, bits).T)


def unpack_zeros(words: np.ndarray, bits: int, version: int) -> np.ndarray:
    """Inverse of `pack_zeros`: int32 [R, G]."""
    stored = unpack_words(np.ascontiguousarray(words.T), bits).astype(np.int32)
    return stored + 1 if version == 1 else stored


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, *, bits: int, version: int) -> Tensor:
    """[R, C] float32 of the four tensors of a matrix. Groups may lie in any order (``desc_act``).

    Raises ValueError where `g_idx` names a group that is not there.
    """
    codes = torch.from_numpy(unpack_words(qweight.numpy(), bits))
    zeros = torch.from_numpy(np.ascontiguousarray(unpack_zeros(qzeros.numpy(), bits, version).T))
    groups = g_idx.long()
    if not 0 <= int(groups.min()) <= int(groups.max()) < len(scales):
        raise ValueError(f"g_idx names groups {int(groups.min())} .. {int(groups.max())}; there are {len(scales)}")
    steps = codes.to(torch.int32) - zeros[groups]
    return (scales.float()[groups] * steps).T.contiguous()
