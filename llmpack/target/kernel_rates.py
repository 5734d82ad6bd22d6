"""The kernels of llama.cpp timed on this machine, with blank models: what `target.speed_model` predicts from.

Three kinds of model: wide matrices, for the rates of an encoding; many heads and nearly no weights, for attention and
for the overhead of a block; and a narrow one, where what is no product of matrices weighs most. Each timing is the best
of several: other load only ever adds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.errors import NumericalError
from llmpack.progress import QUIET, Progress
from llmpack.runtime.llama import LlamaRuntime
from llmpack.runtime.settings import RuntimeSettings
from llmpack.target.blank_model import Shape, write_blank_model
from llmpack.target.device import AttentionRate, Kernel
from llmpack.target.outline import Outline
from llmpack.target.speed_model import Rates, elements

ENCODINGS = ("f16", "q8_0", "q6_k", "q5_1", "q5_0", "q5_k", "q4_1", "q4_0", "q4_k", "iq4_nl", "iq4_xs", "q3_k", "q2_k")
KV_TYPES = ("f16", "q8_0", "q4_0")
HEAD_WIDTHS = (64, 128)
SHORT, LONG = 512, 2048
WRITTEN = 24
BEST_OF = 3

WIDE = Shape(hidden=2048, ffn=5632, blocks=4, heads=16, kv_heads=4, head_dim=128, vocab=1024, context=1024)
"""176 million weights: far more bytes than caches hold, in any encoding."""
NARROW = Shape(hidden=512, ffn=1408, blocks=8, heads=8, kv_heads=2, head_dim=64, vocab=1024, context=1024)


def heads_model(head_dim: int) -> Shape:
    """1024 rows of queries in each block and nearly no weights: writing a token takes the time of its overhead."""
    return Shape(hidden=64, ffn=64, blocks=8, heads=1024 // head_dim, kv_heads=256 // head_dim,
                 head_dim=head_dim, vocab=256, context=LONG + 256)  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """Best seconds of one model: to read `SHORT` and `LONG` tokens, and to write one after few and after `LONG`."""

    outline: Outline
    short: float
    long: float
    first: float
    last: float


def time_kernels(
    threads: int,
    encodings: Sequence[str] = ENCODINGS,
    kv_types: Sequence[str] = KV_TYPES,
    progress: Progress = QUIET,
) -> Rates:
    """Time kernels with so many threads.

    f16 is always among the encodings. Raises RuntimeFailed, and NumericalError where a noisy machine gave timings that
    fit no rates.
    """
    names = list(dict.fromkeys(("f16", *encodings)))
    steps = len(names) + 1 + len(kv_types) * len(HEAD_WIDTHS)
    weights: dict[str, Timing] = {}
    heads: dict[str, Timing] = {}
    with tempfile.TemporaryDirectory(prefix="llmpack-") as folder, progress.task("timing kernels", steps) as done:
        for width in HEAD_WIDTHS:
            path = write_blank_model(Path(folder, f"heads-{width}.gguf"), heads_model(width), "f16")
            for kv in dict.fromkeys(("f16", *kv_types)):
                settings = RuntimeSettings.model_validate({"threads": threads, "kv": kv})
                heads[f"{kv}@{width}"] = _time_heads(path, settings)
                done(1)
        settings = RuntimeSettings(threads=threads, load="no-mmap")
        narrow = _time_weights(write_blank_model(Path(folder, "narrow.gguf"), NARROW, "f16"), settings)
        done(1)
        for name in names:
            path = write_blank_model(Path(folder, "wide.gguf"), WIDE, name)
            weights[name] = _time_weights(path, settings)
            path.unlink()
            done(1)
    return solve(weights, narrow, heads)


def _time_heads(path: Path, settings: RuntimeSettings) -> Timing:
    with LlamaRuntime() as runtime:
        runtime.open(path, settings, LONG + 64)
        runtime.time_prefill(_tokens(64))
        short, first = _best(runtime, SHORT, 0)[0], _best(runtime, 16, WRITTEN)[1]
        long, last = _best(runtime, LONG, WRITTEN)
    return Timing(Outline.of_gguf(GgufFile.open(path)), short, long, first, last)


def _time_weights(path: Path, settings: RuntimeSettings) -> Timing:
    with LlamaRuntime() as runtime:
        runtime.open(path, settings, SHORT + 64)
        runtime.time_prefill(_tokens(64))
        short = _best(runtime, SHORT, 0)[0]
        first = _best(runtime, 16, WRITTEN)[1]
    return Timing(Outline.of_gguf(GgufFile.open(path)), short, short, first, first)


def _tokens(count: int) -> list[int]:
    return [7 * index % 256 for index in range(count)]


def _best(runtime: LlamaRuntime, prompt: int, written: int) -> tuple[float, float]:
    """Best seconds of a prompt, and of a token after it: of the tokens of one run the median counts."""
    reads, writes = [], []
    for _ in range(BEST_OF):
        reads.append(runtime.time_prefill(_tokens(prompt)))
        if written:
            times = sorted(runtime.time_decode(_tokens(written)))
            writes.append(times[len(times) // 2])
    return min(reads), min(writes, default=0.0)


def solve(weights: Mapping[str, Timing], narrow: Timing, heads: Mapping[str, Timing]) -> Rates:
    """The rates that explain the timings; `weights` are those of `WIDE` by encoding, `heads` by cache and width.

    Raises NumericalError where no rates do.
    """
    attention = {name: _attention(name, timing) for name, timing in heads.items()}
    plain = Rates({}, attention, 1.0, 0.0)
    some = next(iter(heads.values()))
    overhead = _positive("a block", some.first) / some.outline.blocks
    # two unknowns, two timings of f16: seconds of an operation, and of a number that is in no product
    (a, b, x), (c, d, y) = (
        (SHORT * _operations(t.outline), SHORT * elements(t.outline), t.short - _attention_seconds(t.outline, plain))
        for t in (weights["f16"], narrow)
    )
    per_element = _positive("what is no product", (a * y - x * c) / (a * d - b * c))
    kernels = {}
    for name, timing in weights.items():
        others = _attention_seconds(timing.outline, plain) + SHORT * elements(timing.outline) * per_element
        reading = _positive(f"products in {name}", timing.short - others)
        writing = _positive(f"writing in {name}", timing.first - overhead * timing.outline.blocks)
        kernels[name] = Kernel.of(timing.outline.nbytes / writing, SHORT * _operations(timing.outline) / reading)
    return Rates(kernels, attention, 1 / per_element, overhead)


def _attention(name: str, timing: Timing) -> AttentionRate:
    """Rates of attention: everything that is linear in the length of the prompt cancels."""
    rows = timing.outline.head_rows * timing.outline.blocks
    ratio = LONG / SHORT
    reading = _positive(f"attention over {name}", timing.long - ratio * timing.short)
    writing = _positive(f"attention over {name}", timing.last - timing.first)
    return AttentionRate.of(4 * rows * (LONG - 16) / writing, 2 * rows * (LONG**2 - ratio * SHORT**2) / reading)


def _attention_seconds(outline: Outline, rates: Rates) -> float:
    pair = rates.pair_seconds("f16", outline.head_rows / outline.heads, prefill=True)
    return pair * outline.heads * outline.blocks * SHORT * (SHORT + 1) / 2


def _operations(outline: Outline) -> float:
    return 2.0 * sum(tensor.parameters for tensor in outline.tensors if tensor.is_linear)


def _positive(what: str, seconds: float) -> float:
    if seconds <= 0:
        raise NumericalError(f"the timings of {what} contradict each other; probe again when nothing else runs")
    return seconds
