"""How long a model takes to read and to write on a processor whose kernels were timed.

    a written token   bytes of weights / rate of their encoding, in rows of that length
                      + attention over the cache / rate of its type
                      + numbers that are no product / rate of such numbers
                      + blocks x overhead
    a read prompt     2 operations per weight and token / rate of the encoding
                      + attention, half masked / rate of the cache's type
                      + numbers that are no product / rate of such numbers
                      + the head, once

Rates are of all cores together. They come from `target.kernel_rates`, which times blank models of other shapes than
those that are predicted. Weights are timed in rows of two lengths, since a row takes time whatever its length (its sum
is brought together, its stream of bytes begins anew), and in a model that a cache may hold. How much of the weights a
cache holds from one token to the next follows from what a token touches, the KV cache included (`held_share`): here
some 55 to 70 MB stayed, from where 4 bits were read at thrice the rate. Attention is timed at some widths of heads and
some numbers of query heads that share a key: the first of them fetches it from far, so that heads with keys of their
own take up to thrice as long. Between two widths the time of one pair of a query and a key is taken to be linear in the
width, beyond them the rate to be that of the nearest; and linear in the keys for each query head. While a token is
written, threads wait for the one that has most of its attention: llama.cpp shares out heads or, over a long cache in
f16, places of the cache (`ggml_compute_forward_flash_attn_ext_f16` in its `ggml-cpu/ops.cpp`).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, exp

import numpy as np

from llmpack.runtime.settings import RuntimeSettings
from llmpack.target.device import AttentionRate, Device, Kernel
from llmpack.target.memory_model import cache_bytes
from llmpack.target.outline import Kept, Outline

DECODE_ERROR, PREFILL_ERROR = 0.15, 0.25
"""How wrong a prediction from timed kernels is taken to be, as a share: what is aimed at. Fourteen
points on one machine, whose kernels were timed right before and after, lay within (README)."""

CACHE_STEP = 256
"""Places of the cache that attention looks at are a multiple of this."""
SHARED_PLACES = 512
"""From so many places on, those of a cache in f16 are shared out among threads in place of heads."""
ROUNDS = 200
"""Of a cache's filling, after which little changes."""
CHUNKS = 4
"""Runs of heads for each thread; whoever has finished one takes the next."""


@dataclass(frozen=True)
class Rates:
    """What a processor can do.

    kernels     by encoding: bytes per second when writing, operations per second when reading
    attention   by type of the cache, width of a head and how many share a key ("f16@64/4"): operations per second
    elementwise numbers per second in everything that is no product of matrices
    overhead    seconds of a block for each written token
    threads     that were timed
    cache       bytes that caches keep from one written token to the next
    """

    kernels: Mapping[str, Kernel]
    attention: Mapping[str, AttentionRate]
    elementwise: float
    overhead: float
    threads: int
    cache: float

    @classmethod
    def of(cls, device: Device) -> Rates | None:
        """The rates of a profile, if it has all of them."""
        figures = device.figures
        kernels, attention, others, overhead, cache = (
            figures.kernels,
            figures.attention,
            figures.elementwise,
            figures.block_overhead,
            figures.cache_kept,
        )
        if kernels is None or attention is None or others is None or overhead is None or cache is None:
            return None
        return cls(kernels.value, attention.value, others.value, overhead.value, device.cores or 1, cache.value)

    def lacks(self, outline: Outline, settings: RuntimeSettings) -> str:
        """What was not timed and is needed for this model, as a reason; empty if nothing is missing."""
        encodings = {tensor.encoding for tensor in outline.tensors if len(tensor.shape) > 1}
        unknown = sorted(encodings - self.kernels.keys())
        if unknown:
            return f"the kernels of {', '.join(unknown)} were not timed"
        widths = _grid(self.attention, settings.kv)
        if len(widths) < 2 and outline.head_rows / outline.heads not in widths:
            return f"attention over a cache in {settings.kv} was not timed"
        if settings.flash_attention == "off":
            return "attention without flash attention was not timed"
        return ""

    def pair_seconds(self, kv: str, head_dim: float, sharing: float, *, prefill: bool) -> float:
        """Seconds of one query head over one cached key and value that so many of its kind share."""
        grid = _grid(self.attention, kv)

        def seconds(width: int) -> float:
            rates = [self.attention[f"{kv}@{width}/{many}"] for many in grid[width]]
            times = [4 * width / (rate.prefill if prefill else rate.decode) for rate in rates]
            return float(np.interp(1 / sharing, [1 / many for many in grid[width]], times))

        widths = list(grid)
        nearest = min(max(head_dim, widths[0]), widths[-1])
        return float(np.interp(nearest, widths, [seconds(width) for width in widths])) * head_dim / nearest


def attention_of(name: str) -> tuple[str, int, int]:
    """The type of the cache, the width of a head and how many share a key, of "f16@64/4"."""
    kv, _, heads = name.partition("@")
    width, _, sharing = heads.partition("/")
    return kv, int(width), int(sharing)


def _grid(attention: Mapping[str, AttentionRate], kv: str) -> dict[int, list[int]]:
    """The timed widths of heads over such a cache, ascending, and for each how many shared a key, descending."""
    found: dict[int, list[int]] = {}
    for name in attention:
        kind, width, sharing = attention_of(name)
        if kind == kv:
            found.setdefault(width, []).append(sharing)
    return {width: sorted(found[width], reverse=True) for width in sorted(found)}


def _pair(outline: Outline, kept: Kept, kv: str, rates: Rates, *, prefill: bool) -> float:
    """`Rates.pair_seconds` of a block."""
    sharing = max(1.0, 2 * outline.head_rows / max(1, kept.numbers))
    return rates.pair_seconds(kv, outline.head_rows / outline.heads, sharing, prefill=prefill)


def decode_seconds(outline: Outline, settings: RuntimeSettings, context: int, rates: Rates) -> float:
    """Seconds of a token that is written with `context` tokens before it. `rates.lacks` is empty."""
    read = [t for t in outline.tensors if len(t.shape) > 1 and (outline.tied or t.part != "embedding")]
    touched = sum(tensor.nbytes * tensor.share for tensor in read) + cache_bytes(outline, settings, context)
    held = held_share(touched, rates.cache)
    weights = sum(
        rates.kernels[tensor.encoding].decode_seconds(tensor.nbytes, tensor.shape[-1], held) * tensor.share
        for tensor in read
    )
    attention = written_attention(outline, settings.kv, context, rates)
    return weights + attention + elements(outline) / rates.elementwise + rates.overhead * outline.blocks


def held_share(touched: float, cache: float) -> float:
    """How much of what is read in turn, over and over, a cache still holds that gives up any of it by chance.

    Between two reads of a piece, (1 - h) x `touched` others take a place each, of which there are `cache`, and so a
    share of h = exp(-(1 - h) x touched / cache) stays. The least such h is what a cache that was empty comes to.
    """
    if touched <= cache:
        return 1.0
    share = 0.0
    for _ in range(ROUNDS if cache > 0 else 0):
        share = exp(-(1 - share) * touched / cache)
    return share


def written_attention(outline: Outline, kv: str, context: int, rates: Rates) -> float:
    """Seconds of attention for a token that is written after `context` others."""
    return sum(
        _pair(outline, kept, kv, rates, prefill=False)
        * written_pairs(kv, outline.heads, min(context, kept.window or context), rates.threads)
        for kept in outline.kept
    )


def read_attention(outline: Outline, kv: str, tokens: int, rates: Rates) -> float:
    """Seconds of attention for a prompt of so many tokens, read from an empty cache."""
    return sum(
        _pair(outline, kept, kv, rates, prefill=True) * outline.heads * _pairs(tokens, kept.window)
        for kept in outline.kept
    )


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
    last = sum(
        rates.kernels[tensor.encoding].decode_seconds(tensor.nbytes, tensor.shape[-1])
        for tensor in outline.tensors
        if tensor.part == head
    )
    attention = read_attention(outline, settings.kv, tokens, rates)
    return tokens * products + last + attention + tokens * elements(outline) / rates.elementwise


def elements(outline: Outline) -> float:
    """Numbers of one token that pass through norms, rotations, activations, sums and roundings to 8 bits."""
    return outline.blocks * (8.0 * outline.hidden + 4.0 * outline.ffn + 4.0 * outline.head_rows)


def _pairs(tokens: int, window: int | None) -> float:
    """Pairs of a query and a key that it sees, over a prompt."""
    if window is None or window >= tokens:
        return tokens * (tokens + 1) / 2
    return window * (window + 1) / 2 + (tokens - window) * window
