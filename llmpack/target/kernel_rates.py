"""The kernels of llama.cpp timed on this machine, with blank models: what `target.speed_model` predicts from.

Four kinds of model: one with long rows of weights and one with short rows, for the rates of an encoding; many heads
and few weights, for attention; and one with nearly no weights at all, for the overhead of a block. The one with short
rows tells more: small, the rate of weights that a cache holds; growing in f16, how much caches keep; large in f16, what
costs time and is no product of matrices. Each timing is what a measurement would show (see `target.measure`): of the
mean of all tokens that are written in a row, hiccups and all, the median of several runs.
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

import numpy as np

from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.encodings import ENCODINGS
from llmpack.errors import NumericalError
from llmpack.progress import QUIET, Progress
from llmpack.runtime.llama import LlamaRuntime
from llmpack.runtime.settings import RuntimeSettings
from llmpack.target.blank_model import Shape, write_blank_model
from llmpack.target.device import LONG_ROW, SHORT_ROW, AttentionRate, Kernel, shortness
from llmpack.target.outline import Outline
from llmpack.target.page_cache import drop_from_cache
from llmpack.target.speed_model import (
    Rates,
    attention_of,
    elements,
    held_share,
    read_attention,
    written_attention,
    written_pairs,
)

TIMED = ("f16", "q8_0", "q6_k", "q5_1", "q5_0", "q5_k", "q4_1", "q4_0", "q4_k", "iq4_nl", "iq4_xs", "q3_k", "q2_k")
SHARING = (1, 4)
"""Query heads for each key and value: the key is fetched from far by the first of them alone."""
HEAD_WIDTHS = {"f16": (64, 96, 128, 256), "q8_0": (64, 128, 256), "q4_0": (64, 128, 256)}
"""Kernels of f16 step over 32 to 128 numbers at once and take what is left over one by one, so that 96 take longer than
128: time is not linear in the width. Rounded caches are read block by block, and slowly: their time is more nearly so
(128 numbers took 2 to 21 % less than a line from 64 to 256 says), and most models have heads of 64 or 128."""
ATTENTION = tuple(
    f"{kv}@{width}/{sharing}" for kv, widths in HEAD_WIDTHS.items() for width, sharing in product(widths, SHARING)
)
FIRST, SHORT = 16, 512
WRITTEN = 24
LONG = 2048 - WRITTEN
"""With what is written after it this fills a cache, of which llama.cpp then gives all threads equal parts."""
RUNS = 3
_MIDDLE = (WRITTEN + 1) // 2

WIDE = Shape(hidden=LONG_ROW, ffn=5632, blocks=16, heads=16, kv_heads=4, head_dim=128, vocab=1024, context=1024)
NARROW = Shape(hidden=SHORT_ROW, ffn=1536, blocks=4, heads=8, kv_heads=2, head_dim=64, vocab=1024, context=1024)
"""These are the fewest blocks, so that what a token costs once weighs little."""
FETCHED, CACHED = 400 << 20, 16 << 20
"""Bytes of models that no cache holds, but for those of servers, and of models that many do."""
GROWING = (12, 18, 26, 40)
"""Blocks of narrow models in f16, 73 to 242 MB: from their times follows what caches keep."""
EMPTY = Shape(hidden=64, ffn=64, blocks=16, heads=2, kv_heads=1, head_dim=64, vocab=256, context=1024)


def model_of(shape: Shape, encoding: str, nbytes: int) -> Shape:
    """The shape with blocks enough for so many bytes in an encoding."""
    weights = sum(math.prod(sides) for name, sides in shape.tensors().items() if name.startswith("blk.0."))
    block_bytes = weights * ENCODINGS.load(encoding)().bits_per_weight / 8
    return replace(shape, blocks=max(shape.blocks, math.ceil(nbytes / block_bytes)))


def heads_model(head_dim: int, sharing: int) -> Shape:
    """Eight heads in each block, few weights, and blocks enough that caches near a core do not hold all keys."""
    return Shape(hidden=64, ffn=64, blocks=2048 // head_dim, heads=8, kv_heads=8 // sharing, head_dim=head_dim,
                 vocab=256, context=LONG + 256)  # fmt: skip


KEPT = (1 << 20, 4 << 30)
"""Least and most that caches may keep. Less makes no difference."""


@dataclass(frozen=True)
class Timing:
    """One model: seconds to read so many tokens, and to write one after so many."""

    outline: Outline
    read: Mapping[int, float]
    written: Mapping[int, float]


@dataclass(frozen=True)
class Timings:
    """All that is timed.

    long_rows, short_rows, cached  by encoding: `WIDE` and `NARROW` of `FETCHED` bytes, `NARROW` of `CACHED` bytes
    growing                        `NARROW` in f16 with the blocks of `GROWING`
    empty                          `EMPTY` in f16
    heads                          by name of the rate of attention: `heads_model`
    """

    long_rows: Mapping[str, Timing]
    short_rows: Mapping[str, Timing]
    cached: Mapping[str, Timing]
    growing: Sequence[Timing]
    empty: Timing
    heads: Mapping[str, Timing]


def time_kernels(
    threads: int,
    encodings: Sequence[str] = TIMED,
    attention: Sequence[str] = ATTENTION,
    load: Literal["mmap", "no-mmap"] = "no-mmap",
    progress: Progress = QUIET,
) -> Rates:
    """Time kernels with so many threads: of these encodings and of f16, and attention of these names (see `Rates`).

    Attention over a cache in f16 must be among them, as all weights are timed over one. `load` is how weights get into
    memory: those of a mapped file that are not repacked may lie in huge pages, from which f16 was read a fifth faster
    here.

    Raises RuntimeFailed, and NumericalError where a noisy machine gave timings that fit no rates.
    """
    names = list(dict.fromkeys(("f16", *encodings)))
    steps = len(names) + len(attention)
    heads: dict[str, Timing] = {}
    long_rows: dict[str, Timing] = {}
    short_rows: dict[str, Timing] = {}
    cached: dict[str, Timing] = {}
    with tempfile.TemporaryDirectory(prefix="llmpack-") as folder, progress.task("timing kernels", steps) as done:
        path = Path(folder, "blank.gguf")
        for name in attention:
            kv, width, sharing = attention_of(name)
            settings = RuntimeSettings.model_validate({"threads": threads, "kv": kv})
            heads[name] = _time_heads(write_blank_model(path, heads_model(width, sharing), "f16"), settings)
            done(1)
        settings = RuntimeSettings(threads=threads, load=load)
        shapes = (EMPTY, *(replace(NARROW, blocks=blocks) for blocks in GROWING))
        empty, *growing = [
            _time_weights(write_blank_model(path, shape, "f16"), settings, read=False) for shape in shapes
        ]
        for name in names:
            for found, shape, read in (
                (cached, model_of(NARROW, name, CACHED), False),
                (short_rows, model_of(NARROW, name, FETCHED), name == "f16"),
                (long_rows, model_of(WIDE, name, FETCHED), True),
            ):
                found[name] = _time_weights(write_blank_model(path, shape, name), settings, read=read)
            done(1)
    return solve(Timings(long_rows, short_rows, cached, growing, empty, heads), threads)


def _time_heads(path: Path, settings: RuntimeSettings) -> Timing:
    with LlamaRuntime() as runtime:
        runtime.open(path, settings, LONG + 64)
        runtime.time_prefill(_tokens(64))
        short, first = _read(runtime, SHORT), _written(runtime, FIRST)
        long = runtime.time_prefill(_tokens(LONG))  # once, as it takes seconds
        last = median(fmean(runtime.time_decode(_tokens(WRITTEN))) for _ in range(RUNS))
    outline = Outline.of_gguf(GgufFile.open(path))
    return Timing(outline, {SHORT: short, LONG: long}, {FIRST: first, LONG: last})


def _time_weights(path: Path, settings: RuntimeSettings, *, read: bool = True) -> Timing:
    if settings.load == "mmap":
        drop_from_cache(path)  # as before a measurement: pages that were written lie otherwise than those that are read
    with LlamaRuntime() as runtime:
        runtime.open(path, settings, SHORT + 64)
        runtime.time_prefill(_tokens(64))
        short, first = {SHORT: _read(runtime, SHORT)} if read else {}, {FIRST: _written(runtime, FIRST)}
    return Timing(Outline.of_gguf(GgufFile.open(path)), short, first)


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


def solve(timings: Timings, threads: int) -> Rates:
    """The rates that explain the timings.

    Models of `FETCHED` bytes are taken to lie in no cache, the others but those of `GROWING` to lie in one.

    Raises NumericalError where no rates explain them.
    """
    attention = {name: _attention(name, timing, threads) for name, timing in timings.heads.items()}
    long_rows, short_rows, cached = timings.long_rows, timings.short_rows, timings.cached
    plain = Rates({}, attention, math.inf, 0.0, threads, 0.0)
    # two unknowns, two timings of f16: seconds of an operation, and of a number that is in no product
    (a, b, x), (c, d, y) = (
        (SHORT * _operations(t.outline), SHORT * elements(t.outline), t.read[SHORT] - _reading(t.outline, plain))
        for t in (long_rows["f16"], short_rows["f16"])
    )
    per_element = _positive("what is no product", (a * y - x * c) / (a * d - b * c))
    plain = replace(plain, elementwise=1 / per_element)
    # and two when writing: seconds of a byte in a cache, and of a block
    (a, x), (b, y) = ((t.outline.nbytes, _writing(t, plain)) for t in (cached["f16"], timings.empty))
    c, d = cached["f16"].outline.blocks, timings.empty.outline.blocks
    plain = replace(plain, overhead=_positive("a block", (a * y - b * x) / (a * d - b * c)))
    kernels = {}
    for name, timing in long_rows.items():
        held = _positive(f"writing in {name}", _writing(cached[name], plain) / cached[name].outline.nbytes)
        long, short = _by_length(name, timing, short_rows[name], plain)
        reading = _positive(f"products in {name}", timing.read[SHORT] - _reading(timing.outline, plain))
        kernels[name] = Kernel.of(1 / long, 1 / short, 1 / held, SHORT * _operations(timing.outline) / reading)
    plain = replace(plain, kernels=kernels)
    return replace(plain, cache=_kept(timings.growing, plain))


def _by_length(name: str, long_rows: Timing, short_rows: Timing, rates: Rates) -> tuple[float, float]:
    """Seconds of a byte in long rows and in short ones, of two models that have both."""
    table = np.array([_by_rows(timing.outline) for timing in (long_rows, short_rows)])
    seconds = np.linalg.solve(table, [_writing(timing, rates) for timing in (long_rows, short_rows)])
    return _positive(f"writing in {name}", float(seconds[0])), _positive(f"writing in {name}", float(seconds[1]))


def _by_rows(outline: Outline) -> tuple[float, float]:
    """Bytes in long rows and in short ones: between them, a part of each."""
    matrices = [tensor for tensor in outline.tensors if len(tensor.shape) > 1]
    short = sum(tensor.nbytes * shortness(tensor.shape[-1]) for tensor in matrices)
    return sum(tensor.nbytes for tensor in matrices) - short, short


def _kept(growing: Sequence[Timing], rates: Rates) -> float:
    """Bytes that caches keep: those that explain best, in relative error, how models in f16 get slower with size."""
    kernel = rates.kernels["f16"]
    found, least = 0.0, math.inf
    for cache in np.geomspace(*KEPT, 400):
        error = 0.0
        for timing in growing:
            held = held_share(timing.outline.nbytes, float(cache))
            long, short = _by_rows(timing.outline)
            seconds = kernel.decode_seconds(long, LONG_ROW, held) + kernel.decode_seconds(short, SHORT_ROW, held)
            error += (_writing(timing, rates) / seconds - 1) ** 2
        if error < least:
            found, least = float(cache), error
    return found


def _attention(name: str, timing: Timing, threads: int) -> AttentionRate:
    """Rates of attention: everything that is linear in the length of the prompt cancels."""
    outline, (kv, *_) = timing.outline, attention_of(name)
    rows, ratio = outline.head_rows * outline.blocks, LONG / SHORT
    few, many = (written_pairs(kv, outline.heads, after + _MIDDLE, threads) for after in (FIRST, LONG))
    reading = _positive(f"attention over {name}", timing.read[LONG] - ratio * timing.read[SHORT])
    writing = _positive(f"attention over {name}", timing.written[LONG] - timing.written[FIRST])
    operations = 4 * rows * (many - few) / outline.heads
    return AttentionRate.of(operations / writing, 2 * rows * (LONG**2 - ratio * SHORT**2) / reading)


def _reading(outline: Outline, rates: Rates) -> float:
    """Seconds of a short prompt that are not those of products."""
    return read_attention(outline, "f16", SHORT, rates) + SHORT * elements(outline) / rates.elementwise


def _writing(timing: Timing, rates: Rates) -> float:
    """Seconds that the weights of a model take of a token after few."""
    outline = timing.outline
    others = written_attention(outline, "f16", FIRST + _MIDDLE, rates) + elements(outline) / rates.elementwise
    return timing.written[FIRST] - others - rates.overhead * outline.blocks


def _operations(outline: Outline) -> float:
    return 2.0 * sum(tensor.parameters for tensor in outline.tensors if tensor.is_linear)


def _positive(what: str, seconds: float) -> float:
    if seconds <= 0:
        raise NumericalError(f"the timings of {what} contradict each other; probe again when nothing else runs")
    return seconds
