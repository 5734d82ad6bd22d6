"""How long a model takes to read and to write on a processor whose kernels were timed.

    a written token   bytes of weights / rate of their encoding
                      + attention over the cache / rate of its type
                      + numbers that are no product / rate of such numbers
                      + blocks x overhead
    a read prompt     2 operations per weight and token / rate of the encoding
                      + attention, half masked / rate of the cache's type
                      + numbers that are no product / rate of such numbers
                      + the head, once

Rates are of all cores together. They come from `target.kernel_rates`, which times blank models of other shapes than
those that are predicted. Attention is timed at some widths of heads; between two of them the time of one pair of a
query and a key is taken to be linear in the width, beyond them the rate to be that of the nearest. While a token is
written, threads wait for the one that has most of its attention: llama.cpp shares out heads or, over a long cache in
f16, places of the cache (`ggml_compute_forward_flash_attn_ext_f16` in its `ggml-cpu/ops.cpp`).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from llmpack.runtime.settings import RuntimeSettings
from llmpack.target.device import AttentionRate, Device, Kernel
from llmpack.target.outline import Outline

DECODE_ERROR, PREFILL_ERROR = 0.15, 0.25
"""How wrong a prediction from timed kernels is taken to be, as a share: what is aimed at, not yet what was measured."""

CACHE_STEP = 256
"""Places of the cache that attention looks at are a multiple of this."""
SHARED_PLACES = 512
"""From so many places on, those of a cache in f16 are shared out among threads in place of heads."""
CHUNKS = 4
"""Runs of heads for each thread; whoever has finished one takes the next."""


@dataclass(frozen=True)
class Rates:
    """What a processor can do.

    kernels     by encoding: bytes per second when writing, operations per second when reading
    attention   by type of the cache and width of a head ("f16@64"): operations per second in both
    elementwise numbers per second in everything that is no product of matrices
    overhead    seconds of a block for each written token
    threads     that were timed
    """

    kernels: Mapping[str, Kernel]
    attention: Mapping[str, AttentionRate]
    elementwise: float
    overhead: float
    threads: int = 1

    @classmethod
    def of(cls, device: Device) -> Rates | None:
        """The rates of a profile, if it has all of them."""
        figures = device.figures
        kernels, attention, others, overhead = (
            figures.kernels,
            figures.attention,
            figures.elementwise,
            figures.block_overhead,
        )
        if kernels is None or attention is None or others is None or overhead is None:
            return None
        return cls(kernels.value, attention.value, others.value, overhead.value, device.cores or 1)

    def lacks(self, outline: Outline, settings: RuntimeSettings) -> str:
        """What was not timed and is needed for this model, as a reason; empty if nothing is missing."""
        encodings = {tensor.encoding for tensor in outline.tensors if len(tensor.shape) > 1}
        unknown = sorted(encodings - self.kernels.keys())
        if unknown:
            return f"the kernels of {', '.join(unknown)} were not timed"
        if len(_widths(self.attention, settings.kv)) < 2:
            return f"attention over a cache in {settings.kv} was not timed"
        if settings.flash_attention == "off":
            return "attention without flash attention was not timed"
        return ""

    def pair_seconds(self, kv: str, head_dim: float, *, prefill: bool) -> float:
        """Seconds of one query head over one cached key and value."""
        widths = _widths(self.attention, kv)

        def seconds(width: int) -> float:
            kernel = self.attention[f"{kv}@{width}"]
            return 4 * width / (kernel.prefill if prefill else kernel.decode)

        above = bisect_left(widths, head_dim)
        if above in (0, len(widths)):
            nearest = widths[0 if above == 0 else -1]
            return seconds(nearest) * head_dim / nearest
        low, high = widths[above - 1], widths[above]
        share = (head_dim - low) / (high - low)
        return (1 - share) * seconds(low) + share * seconds(high)


def _widths(attention: Mapping[str, AttentionRate], kv: str) -> list[int]:
    return sorted(int(name.partition("@")[2]) for name in attention if name.startswith(f"{kv}@"))


def decode_seconds(outline: Outline, settings: RuntimeSettings, context: int, rates: Rates) -> float:
    """Seconds of a token that is written with `context` tokens before it. `rates.lacks` is empty."""
    weights = sum(
        tensor.nbytes * tensor.share / rates.kernels[tensor.encoding].decode
        for tensor in outline.tensors
        if len(tensor.shape) > 1 and (outline.tied or tensor.part != "embedding")
    )
    pair = rates.pair_seconds(settings.kv, outline.head_rows / outline.heads, prefill=False)
    seen = (context if kept.window is None else min(context, kept.window) for kept in outline.kept)
    pairs = sum(written_pairs(settings.kv, outline.heads, places, rates.threads) for places in seen)
    return weights + pair * pairs + elements(outline) / rates.elementwise + rates.overhead * outline.blocks


def written_pairs(kv: str, heads: int, seen: int, threads: int) -> float:
    """Pairs of a query head and a key that a block takes time for when a token is written: those of the thread that has
    most, times the threads."""
    places = CACHE_STEP * ceil(seen / CACHE_STEP)
    if kv == "f16" and places >= SHARED_PLACES:
        return float(heads * min(seen, ceil(places / threads)) * threads)
    return float(_most_heads(heads, threads) * seen * threads)


def _most_heads(heads: int, threads: int) -> int:
    """Heads of the thread that gets most: runs of equal length, each for the thread that is free first."""
    runs = ceil(heads / ceil(heads / (CHUNKS * threads)))
    length = ceil(heads / (threads if threads == 1 or runs < threads else runs))
    taken = [0] * threads
    for start in range(0, heads, length):
        heapq.heapreplace(taken, taken[0] + min(length, heads - start))
    return max(taken)


def prefill_seconds(outline: Outline, settings: RuntimeSettings, tokens: int, rates: Rates) -> float:
    """Seconds to read a prompt of so many tokens from an empty cache. `rates.lacks` is empty."""
    products = sum(
        2 * tensor.parameters * tensor.share / rates.kernels[tensor.encoding].prefill
        for tensor in outline.tensors
        if tensor.is_linear
    )
    head = "embedding" if outline.tied else "output"
    last = sum(t.nbytes / rates.kernels[t.encoding].decode for t in outline.tensors if t.part == head)
    pair = rates.pair_seconds(settings.kv, outline.head_rows / outline.heads, prefill=True)
    pairs = outline.heads * sum(_pairs(tokens, kept.window) for kept in outline.kept)
    return tokens * products + last + pair * pairs + tokens * elements(outline) / rates.elementwise


def elements(outline: Outline) -> float:
    """Numbers of one token that pass through norms, rotations, activations, sums and roundings to 8 bits."""
    return outline.blocks * (8.0 * outline.hidden + 4.0 * outline.ffn + 4.0 * outline.head_rows)


def _pairs(tokens: int, window: int | None) -> float:
    """Pairs of a query and a key that it sees, over a prompt."""
    if window is None or window >= tokens:
        return tokens * (tokens + 1) / 2
    return window * (window + 1) / 2 + (tokens - window) * window
