"""The kernels of llama.cpp timed on this machine, with blank models: what `target.speed_model` predicts from.

Four kinds of model: wide matrices, for the rates of an encoding; many heads and few weights, for attention; a narrow
one, where what is no product of matrices weighs most; and one with nearly no weights at all, for the overhead of a
block. Each timing is what a measurement would show (see `target.measure`): of the mean of all tokens that are written
in a row, hiccups and all, the median of several runs.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Literal

from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.errors import NumericalError
from llmpack.progress import QUIET, Progress
from llmpack.runtime.llama import LlamaRuntime
from llmpack.runtime.settings import RuntimeSettings
from llmpack.target.blank_model import Shape, write_blank_model
from llmpack.target.device import AttentionRate, Kernel
from llmpack.target.outline import Outline
from llmpack.target.page_cache import drop_from_cache
from llmpack.target.speed_model import Rates, elements, read_attention, written_attention, written_pairs

ENCODINGS = ("f16", "q8_0", "q6_k", "q5_1", "q5_0", "q5_k", "q4_1", "q4_0", "q4_k", "iq4_nl", "iq4_xs", "q3_k", "q2_k")
KV_TYPES = ("f16", "q8_0", "q4_0")
HEAD_WIDTHS = (64, 96, 128, 256)
"""Kernels may step over 32 to 128 numbers at once and take what is left over one by one, so that 96 take longer than
128: time is not linear in the width."""
SHARING = (1, 4)
"""Query heads for each key and value: the key is fetched from far by the first of them alone."""
FIRST, SHORT = 16, 512
WRITTEN = 24
LONG = 2048 - WRITTEN
"""With what is written after it this fills a cache, of which llama.cpp then gives all threads equal parts."""
RUNS = 3
_MIDDLE = (WRITTEN + 1) // 2

WIDE = Shape(hidden=2048, ffn=5632, blocks=8, heads=16, kv_heads=4, head_dim=128, vocab=1024, context=1024)
"""361 million weights: more bytes than caches hold but for those of servers. Of half as many, prompts were read a
tenth faster here, and of 22 blocks as much slower."""
NARROW = Shape(hidden=512, ffn=1408, blocks=8, heads=8, kv_heads=2, head_dim=64, vocab=1024, context=1024)
EMPTY = Shape(hidden=64, ffn=64, blocks=16, heads=2, kv_heads=1, head_dim=64, vocab=256, context=1024)


def heads_model(head_dim: int, sharing: int) -> Shape:
    """Eight heads in each block, few weights, and blocks enough that caches near a core do not hold all keys."""
    return Shape(hidden=64, ffn=64, blocks=2048 // head_dim, heads=8, kv_heads=8 // sharing, head_dim=head_dim,
                 vocab=256, context=LONG + 256)  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """Seconds of one model: to read `SHORT` and `LONG` tokens, and to write one after `FIRST` and after `LONG`."""

    outline: Outline
    short: float
    long: float
    first: float
    last: float


def time_kernels(
    threads: int,
    encodings: Sequence[str] = ENCODINGS,
    kv_types: Sequence[str] = KV_TYPES,
    heads: Sequence[tuple[int, int]] = tuple(product(HEAD_WIDTHS, SHARING)),
    load: Literal["mmap", "no-mmap"] = "no-mmap",
    progress: Progress = QUIET,
) -> Rates:
    """Time kernels with so many threads; attention for heads of some width, of which some share a key.

    f16 is always among the encodings. `load` is how weights get into memory: those of a mapped file that are not
    repacked may lie in huge pages, from which f16 was read a fifth faster here.

    Raises RuntimeFailed, and NumericalError where a noisy machine gave timings that fit no rates.
    """
    names = list(dict.fromkeys(("f16", *encodings)))
    steps = len(names) + 1 + len(dict.fromkeys(("f16", *kv_types))) * len(heads)
    weights: dict[str, Timing] = {}
    attention: dict[str, Timing] = {}
    with tempfile.TemporaryDirectory(prefix="llmpack-") as folder, progress.task("timing kernels", steps) as done:
        for width, sharing in heads:
            path = write_blank_model(Path(folder, "heads.gguf"), heads_model(width, sharing), "f16")
            for kv in dict.fromkeys(("f16", *kv_types)):
                settings = RuntimeSettings.model_validate({"threads": threads, "kv": kv})
                attention[f"{kv}@{width}/{sharing}"] = _time_heads(path, settings)
                done(1)
        settings = RuntimeSettings(threads=threads, load=load)
        empty, narrow = (
            _time_weights(write_blank_model(Path(folder, "small.gguf"), shape, "f16"), settings)
            for shape in (EMPTY, NARROW)
        )
        done(1)
        for name in names:
            path = write_blank_model(Path(folder, "wide.gguf"), WIDE, name)
            weights[name] = _time_weights(path, settings)
            path.unlink()
            done(1)
    return solve(weights, narrow, empty, attention, threads)


def _time_heads(path: Path, settings: RuntimeSettings) -> Timing:
    with LlamaRuntime() as runtime:
        runtime.open(path, settings, LONG + 64)
        runtime.time_prefill(_tokens(64))
        short, first = _read(runtime, SHORT), _written(runtime, FIRST)
        long = runtime.time_prefill(_tokens(LONG))  # once, as it takes seconds
        last = median(fmean(runtime.time_decode(_tokens(WRITTEN))) for _ in range(RUNS))
    return Timing(Outline.of_gguf(GgufFile.open(path)), short, long, first, last)


def _time_weights(path: Path, settings: RuntimeSettings) -> Timing:
    if settings.load == "mmap":
        drop_from_cache(path)  # as before a measurement: pages that were written lie otherwise than those that are read
    with LlamaRuntime() as runtime:
        runtime.open(path, settings, SHORT + 64)
        runtime.time_prefill(_tokens(64))
        short, first = _read(runtime, SHORT), _written(runtime, FIRST)
    return Timing(Outline.of_gguf(GgufFile.open(path)), short, short, first, first)


def _tokens(count: int) -> list[int]:
    return [7 * index % 256 for index in range(count)]


def _read(runtime: LlamaRuntime, prompt: int) -> float:
    return median(runtime.time_prefill(_tokens(prompt)) for _ in range(RUNS))


def _written(runtime: LlamaRuntime, prompt: int) -> float:
    """Seconds of a token after a prompt, which is read again each time."""
    means = []
    for _ in range(RUNS):
        runtime.time_prefill(_tokens(prompt))
        means.append(fmean(runtime.time_decode(_tokens(WRITTEN))))
    return median(means)


def solve(
    weights: Mapping[str, Timing], narrow: Timing, empty: Timing, heads: Mapping[str, Timing], threads: int
) -> Rates:
    """The rates that explain the timings: `weights` are those of `WIDE` by encoding, `heads` have the names of rates.

    Raises NumericalError where no rates do.
    """
    attention = {name: _attention(name, timing, threads) for name, timing in heads.items()}
    plain = Rates({}, attention, math.inf, 0.0, threads)
    # two unknowns, two timings of f16: seconds of an operation, and of a number that is in no product
    (a, b, x), (c, d, y) = (
        (SHORT * _operations(t.outline), SHORT * elements(t.outline), t.short - _reading(t.outline, plain))
        for t in (weights["f16"], narrow)
    )
    per_element = _positive("what is no product", (a * y - x * c) / (a * d - b * c))
    plain = replace(plain, elementwise=1 / per_element)
    # and the same when writing: seconds of a byte, and of a block
    (a, b, x), (c, d, y) = (
        (t.outline.nbytes, t.outline.blocks, t.first - _writing(t.outline, plain)) for t in (weights["f16"], empty)
    )
    overhead = _positive("a block", (a * y - x * c) / (a * d - b * c))
    kernels = {}
    for name, timing in weights.items():
        others = _reading(timing.outline, plain)
        reading = _positive(f"products in {name}", timing.short - others)
        others = _writing(timing.outline, plain) + overhead * timing.outline.blocks
        writing = _positive(f"writing in {name}", timing.first - others)
        kernels[name] = Kernel.of(timing.outline.nbytes / writing, SHORT * _operations(timing.outline) / reading)
    return replace(plain, kernels=kernels, overhead=overhead)


def _attention(name: str, timing: Timing, threads: int) -> AttentionRate:
    """Rates of attention: everything that is linear in the length of the prompt cancels."""
    outline, kv = timing.outline, name.partition("@")[0]
    rows, ratio = outline.head_rows * outline.blocks, LONG / SHORT
    few, many = (written_pairs(kv, outline.heads, after + _MIDDLE, threads) for after in (FIRST, LONG))
    reading = _positive(f"attention over {name}", timing.long - ratio * timing.short)
    writing = _positive(f"attention over {name}", timing.last - timing.first)
    operations = 4 * rows * (many - few) / outline.heads
    return AttentionRate.of(operations / writing, 2 * rows * (LONG**2 - ratio * SHORT**2) / reading)


def _reading(outline: Outline, rates: Rates) -> float:
    """Seconds of a short prompt that are not those of products."""
    return read_attention(outline, "f16", SHORT, rates) + SHORT * elements(outline) / rates.elementwise


def _writing(outline: Outline, rates: Rates) -> float:
    """Seconds of a token after few that are not those of reading weights, nor a block's overhead."""
    return written_attention(outline, "f16", FIRST + _MIDDLE, rates) + elements(outline) / rates.elementwise


def _operations(outline: Outline) -> float:
    return 2.0 * sum(tensor.parameters for tensor in outline.tensors if tensor.is_linear)


def _positive(what: str, seconds: float) -> float:
    if seconds <= 0:
        raise NumericalError(f"the timings of {what} contradict each other; probe again when nothing else runs")
    return seconds
