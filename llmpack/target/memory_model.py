"""What llama.cpp takes of memory, term by term, from shapes and settings alone.

Sources: llama.cpp at 0c1e57098: ``ggml/src/ggml-cpu/repack.cpp`` (which types are repacked),
``src/llama-kv-cache.cpp`` and ``-iswa.cpp`` (the cache), ``src/llama-model-loader.cpp`` (what is mapped). The compute
term is what a run really touches of the scratch buffer, which is far less than what is reserved (the
reservation holds logits for every token of a batch); it was fitted to 40 runs over six shapes
(width 576 to 4096, vocabulary 32k to 152k), four batch sizes and contexts of 512 to 4096, with an error of at
most 6 MiB, and 5 % of the term for most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from llmpack.runtime.settings import RuntimeSettings
from llmpack.target.outline import Outline
from llmpack.units import format_size

KV_BYTES = {"f16": 2.0, "q8_0": 34 / 32, "q5_0": 22 / 32, "q4_0": 18 / 32}
"""Bytes of one number in the KV cache."""
KV_TYPES = ("f16", "q8_0", "q4_0")
"""Types that settings may ask for."""
CONTEXT_PADDING = 256
MIB = 1 << 20

# Which encodings are repacked, by what the processor can do, and how many rows a repacked group has.
_REPACKED_ON_AVX2 = {"q4_0": 8, "q4_k": 8, "iq4_nl": 8, "mxfp4": 8}
_REPACKED_ON_AVX512 = {"q2_k": 8}
_REPACKED_ON_DOTPROD = {"q4_0": 4, "q4_k": 8, "q5_k": 8, "q6_k": 8, "q8_0": 4, "iq4_nl": 4, "mxfp4": 4}
_REPACKED_ON_RVV = {"q4_0": 16, "q4_k": 16, "q2_k": 16, "iq4_nl": 16, "q8_0": 16}  # with 256-bit vectors

MEMORY_ERROR, UNVERIFIED_ERROR = 0.05, 0.10
"""How wrong the estimate of memory may be, as a share: for architectures that tests hold to the real runtime, and for
others."""
_RUNTIME_BASE = 24 * MIB
"""Interpreter and libraries of the runtime's process, half of it pages of files."""
_PER_TOKEN_OF_VOCABULARY = 300
"""Bytes that llama.cpp's tokenizer keeps for each token: texts, merges and their tables."""
_PER_BLOCK = 45 << 10
_SCRATCH_BASE = 1.4 * MIB


@dataclass(frozen=True)
class Interval:
    """A figure and the ends of what it may be."""

    low: float
    value: float
    high: float

    @classmethod
    def around(cls, value: float, share: float) -> Interval:
        """`value`, wrong by at most `share` of it."""
        return cls(value * (1 - share), value, value * (1 + share))

    def to_json(self) -> dict[str, float]:
        """As JSON values."""
        return {"low": self.low, "value": self.value, "high": self.high}


@dataclass(frozen=True)
class Term:
    """One part of the memory, and why it has that size."""

    name: str
    nbytes: int
    why: str


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of a runtime's process at the full context.

    load        the load mode that it holds for, "mmap" or "no-mmap"
    terms       its parts
    total       their sum: what is resident at the peak, as `top` shows it
    hard        thereof bytes that cannot be taken back without slowing the model down: of a mapped file whose weights
                were repacked nothing reads the originals any more, and the system may drop their pages
    other_load  the other load mode, and the resident bytes with it; None where the runtime has no such choice
    caches      bytes of the KV cache by type, for the types that the settings could have
    """

    load: str
    terms: tuple[Term, ...]
    total: Interval
    hard: int
    other_load: tuple[str, int] | None = None
    caches: Mapping[str, int] = field(default_factory=dict)

    @property
    def advice(self) -> tuple[str, ...]:
        """What the other load mode and the other types of cache would take, and which mode to choose."""
        if self.other_load is None:
            return ()
        mode, nbytes = self.other_load
        saved = self.total.value - nbytes
        if self.load == "mmap" and saved > 0:
            text = f"saves {format_size(saved)} at the same speed: recommended"
        elif saved > 0:
            text = f"saves {format_size(saved)}"
        elif saved < 0:
            text = f"takes {format_size(-saved)} more, for copies beside the mapped originals"
        else:
            text = "takes the same: nothing is repacked"
        caches = ", ".join(f"{format_size(size)} in {kv}" for kv, size in self.caches.items())
        return (f'load = "{mode}": {format_size(nbytes)}, {text}', f"KV cache: {caches}")

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **self.total.to_json(),
            "load": self.load,
            "terms": [{"name": t.name, "bytes": t.nbytes, "why": t.why} for t in self.terms],
            "hard": self.hard,
            "other_load": self.other_load and {"load": self.other_load[0], "value": self.other_load[1]},
            "caches": dict(self.caches),
        }


def effective_load(settings: RuntimeSettings) -> str:
    """What "auto" comes to on a processor: llama.cpp maps the file."""
    return "mmap" if settings.load == "auto" else settings.load


def memory(
    outline: Outline, settings: RuntimeSettings, instruction_sets: frozenset[str], context: int
) -> MemoryEstimate:
    """What a model takes in llama.cpp on a processor with these instruction sets. `outline.unmodelled` is empty."""
    held = weights(outline, instruction_sets)
    load = effective_load(settings)
    other = "no-mmap" if load == "mmap" else "mmap"
    terms = _terms(outline, settings, held, load, context)
    total = sum(term.nbytes for term in terms)
    return MemoryEstimate(
        load=load,
        terms=terms,
        total=Interval.around(total, MEMORY_ERROR if outline.verified else UNVERIFIED_ERROR),
        hard=total - (held.replaced if load == "mmap" else 0),
        other_load=(other, total - held.resident(load) + held.resident(other)),
        caches={kv: cache_bytes(outline, settings.model_copy(update={"kv": kv}), context) for kv in KV_TYPES},
    )


def _terms(outline: Outline, settings: RuntimeSettings, held: Weights, load: str, context: int) -> tuple[Term, ...]:
    mapped = load == "mmap"
    kept = held.stored - (0 if mapped else held.replaced)
    copied = "repacked for the processor's kernels" + (", beside the mapped originals" if mapped else "")
    tokens = cache_tokens(outline, settings, context)
    seen = f"{max(tokens)}" if len({*tokens}) == 1 else f"{min(tokens)} to {max(tokens)}"
    numbers = sorted({block.numbers for block in outline.kept})
    each = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    return (
        Term("weights", kept, "pages of the mapped file" if mapped else "read into memory"),
        *([Term("repacked weights", held.repacked, copied)] if held.repacked else []),
        Term(
            "KV cache",
            cache_bytes(outline, settings, context),
            f"{outline.blocks} blocks x {each} numbers x {seen} tokens in {settings.kv}",
        ),
        Term("scratch", scratch_bytes(outline, settings, context), f"activations of {settings.ubatch} tokens at once"),
        Term("logits", 4 * outline.vocab, f"{outline.vocab} numbers in f32"),
        Term("runtime", base_bytes(outline), "interpreter, libraries, tokenizer"),
    )


def repacked_rows(instruction_sets: frozenset[str]) -> Mapping[str, int]:
    """Encodings that llama.cpp copies into another order on that processor, and the rows that it joins in one copy."""
    if "avx2" in instruction_sets:
        return _REPACKED_ON_AVX2 | (_REPACKED_ON_AVX512 if "avx512" in instruction_sets else {})
    if "dotprod" in instruction_sets or "i8mm" in instruction_sets:
        return _REPACKED_ON_DOTPROD
    return _REPACKED_ON_RVV if "rvv" in instruction_sets else {}


@dataclass(frozen=True)
class Weights:
    """Bytes of the weights in memory.

    stored    as in the file
    repacked  copies in the processor's own order, made while loading
    replaced  originals that nothing reads any more once their copy is made
    """

    stored: int
    repacked: int
    replaced: int

    def resident(self, load: str) -> int:
        """Bytes resident: mapped files keep the originals beside their copies, as `top` shows it."""
        return self.stored + self.repacked - (0 if load == "mmap" else self.replaced)


class Tensor(Protocol):
    """What of a tensor decides where it stands in memory: a `Stored`, or a `TensorSpec` of a graph."""

    @property
    def part(self) -> str:
        """What it is, in the words of recipes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[rows, columns] for matrices."""

    @property
    def encoding(self) -> str:
        """How it is stored."""

    @property
    def nbytes(self) -> int:
        """Bytes under its encoding."""


def weights(outline: Outline, instruction_sets: frozenset[str]) -> Weights:
    """The weights of a model as it stands in the file."""
    tied = outline.tied
    each = [weights_of(tensor, instruction_sets, tied=tied) for tensor in outline.tensors]
    return Weights(
        stored=sum(one.stored for one in each),
        repacked=sum(one.repacked for one in each),
        replaced=sum(one.replaced for one in each),
    )


def weights_of(tensor: Tensor, instruction_sets: frozenset[str], *, tied: bool) -> Weights:
    """One tensor as it stands in the file.

    An embedding that is also the output head (`tied`) is looked up in its stored order and multiplied in the
    repacked one, so it stands in memory twice even where the file is not mapped.
    """
    embedding = tensor.part == "embedding"
    rows = repacked_rows(instruction_sets).get(tensor.encoding)
    groups = rows is not None and len(tensor.shape) == 2 and tensor.shape[0] % rows == 0
    copied = tensor.nbytes if groups and (tied or not embedding) else 0
    return Weights(tensor.nbytes, copied, 0 if embedding else copied)


def padded(context: int) -> int:
    """The context that llama.cpp really allocates."""
    return -(-context // CONTEXT_PADDING) * CONTEXT_PADDING


def cache_tokens(outline: Outline, settings: RuntimeSettings, context: int) -> tuple[int, ...]:
    """Tokens that the KV cache holds for each block: all, or a window and one batch where the runtime has windows."""
    full = padded(context)
    return tuple(
        full if kept.window is None else padded(min(full, kept.window + settings.ubatch)) for kept in outline.kept
    )


def cache_bytes(outline: Outline, settings: RuntimeSettings, context: int) -> int:
    """Bytes of the KV cache, keys and values of every block."""
    held = zip(outline.kept, cache_tokens(outline, settings, context), strict=True)
    return int(sum(kept.numbers * tokens for kept, tokens in held) * KV_BYTES[settings.kv])


def scratch_bytes(outline: Outline, settings: RuntimeSettings, context: int) -> int:
    """Bytes of the compute buffer that a run touches while it reads a prompt of the full context."""
    tokens = min(settings.ubatch, context)
    seen = padded(context)
    activations = max(2.5 * outline.ffn + 7.4 * outline.hidden - 3.4 * outline.head_rows, 2.5 * outline.ffn)
    rows = 4 * activations + 2.4 * seen
    if settings.flash_attention == "off":  # all scores in f32, their softmax again in f16
        rows = max(rows, 6.0 * seen * outline.heads + 4 * 8 * outline.hidden)
    inputs_of_kernels = 1.125 * outline.ffn  # rows rounded to 8 bits for the integer kernels
    return int(tokens * (rows + inputs_of_kernels) + _SCRATCH_BASE)


def base_bytes(outline: Outline) -> int:
    """Bytes of the process beside the model: interpreter, libraries, tokenizer, graph."""
    return _RUNTIME_BASE + _PER_TOKEN_OF_VOCABULARY * outline.vocab + _PER_BLOCK * outline.blocks
