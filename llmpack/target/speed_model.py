"""How long a model takes to read and to write on a processor whose kernels were timed.

    a written token   bytes of weights / rate of their encoding
                      + attention over the cache / rate of its type
                      + blocks x overhead
    a read prompt     2 operations per weight and token / rate of the encoding
                      + attention, half masked / rate of the cache's type
                      + numbers that are no product / rate of such numbers
                      + the head, once

Rates are of all cores together. They come from `target.kernel_rates`, which times blank models of other shapes than
those that are predicted. Attention is timed at two widths of heads; between and beyond them, the time of one pair of
a query and a key is taken to be linear in the width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmpack.runtime.settings import RuntimeSettings
from llmpack.target.device import AttentionRate, Device, Kernel
from llmpack.target.outline import Outline

DECODE_ERROR, PREFILL_ERROR = 0.15, 0.25
"""How wrong a prediction from timed kernels is taken to be, as a share: what is aimed at, not yet what was measured."""


@dataclass(frozen=True)
class Rates:
    """What a processor can do.

    kernels     by encoding: bytes per second when writing, operations per second when reading
    attention   by type of the cache and width of a head ("f16@64"): operations per second in both
    elementwise numbers per second in everything that is no product of matrices, when reading
    overhead    seconds of a block for each written token
    """

    kernels: Mapping[str, Kernel]
    attention: Mapping[str, AttentionRate]
    elementwise: float
    overhead: float

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
        return cls(kernels.value, attention.value, others.value, overhead.value)

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
        low, high = widths[0], widths[-1]

        def seconds(width: int) -> float:
            kernel = self.attention[f"{kv}@{width}"]
            return 4 * width / (kernel.prefill if prefill else kernel.decode)

        slope = (seconds(high) - seconds(low)) / (high - low)
        return max(seconds(low) + slope * (head_dim - low), 0.1 * seconds(low))


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
    seen = sum(context if kept.window is None else min(context, kept.window) for kept in outline.kept)
    return weights + pair * outline.heads * seen + rates.overhead * outline.blocks


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
