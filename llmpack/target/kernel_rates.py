"""The kernels of llama.cpp timed on this machine, with blank models: what `target.speed_model` predicts from.

Four kinds of model: one with long rows of weights and a small one with short rows, for the rates of an encoding; many
heads and few weights, for attention; and one with nearly no weights at all, for the overhead of a block. The one with
short rows tells too, in f16, what costs time and is no product of matrices. Each timing is what a measurement would
show (see `target.measure`): of the mean of all tokens that are written in a row, hiccups and all, the median of several
runs.
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
from llmpack.target.speed_model import Rates, attention_of, elements, read_attention, written_attention, written_pairs

TIMED = ("f16", "q8_0", "q6_k", "q5_1", "q5_0", "q5_k", "q4_1", "q4_0", "q4_k", "iq4_nl", "iq4_xs", "q3_k", "q2_k")
SHARING = (1, 4)
"""Query heads for each key and value: the key is fetched from far by the first of them alone."""
HEAD_WIDTHS = {"f16": (64, 96, 128, 256), "q8_0": (64, 256), "q4_0": (64, 256)}
"""Kernels of f16 step over 32 to 128 numbers at once and take what is left over one by one, so that 96 take longer than
128: time is not linear in the width. Rounded caches are read block by block, and slowly."""
ATTENTION = tuple(
    f"{kv}@{width}/{sharing}" for kv, widths in HEAD_WIDTHS.items() for width, sharing in product(widths, SHARING)
)
FIRST, SHORT = 16, 512
WRITTEN = 24
LONG = 2048 - WRITTEN
"""With what is written after it this fills a cache, of which llama.cpp then gives all threads equal parts."""
RUNS = 3
_MIDDLE = (WRITTEN + 1) // 2

WIDE = Shape(hidden=LONG_ROW, ffn=5632, blocks=8, heads=16, kv_heads=4, head_dim=128, vocab=1024, context=1024)
"""With these blocks in f16, and in other encodings with as many as make `WIDE_BYTES`. With half as many blocks prompts
were read a tenth faster here, and with 22 as much slower."""
WIDE_BYTES = 400 << 20
"""Of 200 MB in 4 bits a large cache held a part here, and they were read up to a fifth faster than 580 MB."""
NARROW = Shape(hidden=SHORT_ROW, ffn=1536, blocks=40, heads=8, kv_heads=2, head_dim=64, vocab=1024, context=1024)
"""121 million weights: as many as small models have, of which large caches hold a part in 4 bits."""
EMPTY = Shape(hidden=64, ffn=64, blocks=16, heads=2, kv_heads=1, head_dim=64, vocab=256, context=1024)


def wide_model(encoding: str) -> Shape:
    """`WIDE` with as many blocks as `WIDE_BYTES` want."""
    weights = sum(math.prod(sides) for name, sides in WIDE.tensors().items() if name.startswith("blk.0."))
    block_bytes = weights * ENCODINGS.load(encoding)().bits_per_weight / 8
    return replace(WIDE, blocks=max(WIDE.blocks, math.ceil(WIDE_BYTES / block_bytes)))


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
    with tempfile.TemporaryDirectory(prefix="llmpack-") as folder, progress.task("timing kernels", steps) as done:
        path = Path(folder, "blank.gguf")
        for name in attention:
            kv, width, sharing = attention_of(name)
            settings = RuntimeSettings.model_validate({"threads": threads, "kv": kv})
            heads[name] = _time_heads(write_blank_model(path, heads_model(width, sharing), "f16"), settings)
            done(1)
        settings = RuntimeSettings(threads=threads, load=load)
        empty = _time_weights(write_blank_model(path, EMPTY, "f16"), settings, read=False)
        for name in names:
            short_rows[name] = _time_weights(write_blank_model(path, NARROW, name), settings, read=name == "f16")
            long_rows[name] = _time_weights(write_blank_model(path, wide_model(name), name), settings)
            done(1)
    return solve(long_rows, short_rows, empty, heads, threads)


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
    # and three when writing: seconds of a byte in long rows and in short ones, and of a block
    table = np.array([_writing(timing, plain) for timing in (long_rows["f16"], short_rows["f16"], empty)])
    *_, overhead = np.linalg.solve(table[:, :3], table[:, 3])
    plain = replace(plain, overhead=_positive("a block", float(overhead)))
    kernels = {}
    for name, timing in long_rows.items():
        table = np.array([_writing(one, plain) for one in (timing, short_rows[name])])
        long, short = (_positive(f"writing in {name}", float(s)) for s in np.linalg.solve(table[:, :2], table[:, 3]))
        reading = _positive(f"products in {name}", timing.read[SHORT] - _reading(timing.outline, plain))
        kernels[name] = Kernel.of(1 / long, 1 / short, SHORT * _operations(timing.outline) / reading)
    return replace(plain, kernels=kernels)


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


def _writing(timing: Timing, rates: Rates) -> tuple[float, float, int, float]:
    """Bytes in long rows and in short ones, blocks, and the seconds that they take of a token after few."""
    outline = timing.outline
    matrices = [tensor for tensor in outline.tensors if len(tensor.shape) > 1]
    short = sum(tensor.nbytes * shortness(tensor.shape[-1]) for tensor in matrices)
    others = written_attention(outline, "f16", FIRST + _MIDDLE, rates) + elements(outline) / rates.elementwise
    seconds = timing.written[FIRST] - others - rates.overhead * outline.blocks
    return sum(tensor.nbytes for tensor in matrices) - short, short, outline.blocks, seconds


def _operations(outline: Outline) -> float:
    return 2.0 * sum(tensor.parameters for tensor in outline.tensors if tensor.is_linear)


def _positive(what: str, seconds: float) -> float:
    if seconds <= 0:
        raise NumericalError(f"the timings of {what} contradict each other; probe again when nothing else runs")
    return seconds
