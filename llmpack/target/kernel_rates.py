"""The kernels of llama.cpp timed on this machine, with blank models: what `target.speed_model` predicts from.

Four kinds of model: long rows and short ones, for the rates of an encoding and for what a row takes whatever its
length; many heads and few weights, for attention; and one with nearly no weights at all, for the overhead of a block.
The one with short rows tells too, in f16, what costs time and is no product of matrices. Each timing is what a
measurement would show (see `target.measure`): of the mean of all tokens that are written in a row, hiccups and all,
the median of several runs.
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
NARROW = Shape(hidden=512, ffn=1536, blocks=96, heads=8, kv_heads=2, head_dim=64, vocab=1024, context=1024)
"""289 million weights in rows that are short. With a fifth of the blocks a cache held part of them in 4 bits."""
EMPTY = Shape(hidden=64, ffn=64, blocks=16, heads=2, kv_heads=1, head_dim=64, vocab=256, context=1024)


def heads_model(head_dim: int, sharing: int) -> Shape:
    """Eight heads in each block, few weights, and blocks enough that caches near a core do not hold all keys."""
    return Shape(hidden=64, ffn=64, blocks=2048 // head_dim, heads=8, kv_heads=8 // sharing, head_dim=head_dim,
                 vocab=256, context=LONG + 256)  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """One model: seconds to read so many tokens, and to write one after so many."""

    outline: Outline
    read: Mapping[int, float]
    written: Mapping[int, float]


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
    steps = len(names) + len(dict.fromkeys(("f16", *kv_types))) * len(heads)
    long_rows: dict[str, Timing] = {}
    short_rows: dict[str, Timing] = {}
    attention: dict[str, Timing] = {}
    with tempfile.TemporaryDirectory(prefix="llmpack-") as folder, progress.task("timing kernels", steps) as done:
        for width, sharing in heads:
            path = write_blank_model(Path(folder, "heads.gguf"), heads_model(width, sharing), "f16")
            for kv in dict.fromkeys(("f16", *kv_types)):
                settings = RuntimeSettings.model_validate({"threads": threads, "kv": kv})
                attention[f"{kv}@{width}/{sharing}"] = _time_heads(path, settings)
                done(1)
        settings = RuntimeSettings(threads=threads, load=load)
        path = Path(folder, "weights.gguf")
        empty = _time_weights(write_blank_model(path, EMPTY, "f16"), settings, read=False)
        for name in names:
            short_rows[name] = _time_weights(write_blank_model(path, NARROW, name), settings, read=name == "f16")
            long_rows[name] = _time_weights(write_blank_model(path, WIDE, name), settings)
            done(1)
    return solve(long_rows, short_rows, empty, attention, threads)


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


def solve(
    long_rows: Mapping[str, Timing],
    short_rows: Mapping[str, Timing],
    empty: Timing,
    heads: Mapping[str, Timing],
    threads: int,
) -> Rates:
    """The rates that explain the timings: of `WIDE` and `NARROW` by encoding, of `EMPTY`, of heads by name of the rate.

    What a row and what a block takes is nothing where the timings explain themselves better without.

    Raises NumericalError where no rates explain them.
    """
    attention = {name: _attention(name, timing, threads) for name, timing in heads.items()}
    plain = Rates({}, attention, math.inf, 0.0, threads)
    # two unknowns, two timings of f16: seconds of an operation, and of a number that is in no product
    (a, b, x), (c, d, y) = (
        (SHORT * _operations(t.outline), SHORT * elements(t.outline), t.read[SHORT] - _reading(t.outline, plain))
        for t in (long_rows["f16"], short_rows["f16"])
    )
    per_element = _positive("what is no product", (a * y - x * c) / (a * d - b * c))
    plain = replace(plain, elementwise=1 / per_element)
    # and three when writing: seconds of a byte, of a row, and of a block
    *_, overhead = _explain("f16", [_writing(t, plain) for t in (long_rows["f16"], short_rows["f16"], empty)])
    plain = replace(plain, overhead=overhead)
    kernels = {}
    for name, timing in long_rows.items():
        per_byte, per_row, _ = _explain(name, [_writing(t, plain) for t in (timing, short_rows[name])])
        reading = _positive(f"products in {name}", timing.read[SHORT] - _reading(timing.outline, plain))
        kernels[name] = Kernel.of(1 / per_byte, SHORT * _operations(timing.outline) / reading, per_row)
    return replace(plain, kernels=kernels)


def _explain(name: str, timings: Sequence[tuple[float, float, float, float]]) -> tuple[float, float, float]:
    """Seconds of a byte, of a row and of a block, none below zero, that leave the least relative error of the timings.

    Each has its bytes, rows, blocks and seconds. Where there are but two timings, blocks have been taken off.
    """
    table = np.array(timings)
    _positive(f"writing in {name}", float(table[:, 3].min()))
    shares = table[:, :3] / table[:, 3:]
    best, least = np.zeros(3), math.inf
    for columns in [[0], [0, 1]] if len(table) == 2 else [[0], [0, 1], [0, 2], [0, 1, 2]]:
        seconds = np.linalg.lstsq(shares[:, columns], np.ones(len(table)))[0]
        error = float(((shares[:, columns] @ seconds - 1) ** 2).sum())
        if seconds.min() >= 0 and error < least:
            best, least = np.zeros(3), error
            best[columns] = seconds
    return float(best[0]), float(best[1]), float(best[2])


def _attention(name: str, timing: Timing, threads: int) -> AttentionRate:
    """Rates of attention: everything that is linear in the length of the prompt cancels."""
    outline, kv = timing.outline, name.partition("@")[0]
    rows, ratio = outline.head_rows * outline.blocks, LONG / SHORT
    few, many = (written_pairs(kv, outline.heads, after + _MIDDLE, threads) for after in (FIRST, LONG))
    reading = _positive(f"attention over {name}", timing.read[LONG] - ratio * timing.read[SHORT])
    writing = _positive(f"attention over {name}", timing.written[LONG] - timing.written[FIRST])
    operations = 4 * rows * (many - few) / outline.heads
    return AttentionRate.of(operations / writing, 2 * rows * (LONG**2 - ratio * SHORT**2) / reading)


def _reading(outline: Outline, rates: Rates) -> float:
    """Seconds of a short prompt that are not those of products."""
    return read_attention(outline, "f16", SHORT, rates) + SHORT * elements(outline) / rates.elementwise


def _writing(timing: Timing, rates: Rates) -> tuple[float, float, float, float]:
    """Bytes, rows and blocks of a model, and the seconds that they take of a token after few."""
    outline = timing.outline
    others = written_attention(outline, "f16", FIRST + _MIDDLE, rates) + elements(outline) / rates.elementwise
    rows = sum(math.prod(tensor.shape[:-1]) for tensor in outline.tensors if len(tensor.shape) > 1)
    seconds = timing.written[FIRST] - others - rates.overhead * outline.blocks
    return outline.nbytes, rows, outline.blocks, seconds


def _operations(outline: Outline) -> float:
    return 2.0 * sum(tensor.parameters for tensor in outline.tensors if tensor.is_linear)


def _positive(what: str, seconds: float) -> float:
    if seconds <= 0:
        raise NumericalError(f"the timings of {what} contradict each other; probe again when nothing else runs")
    return seconds
