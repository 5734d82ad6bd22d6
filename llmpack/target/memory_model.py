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
from dataclasses import dataclass
from typing import Any

from llmpack.models import family_of
from llmpack.models.graph import ModelGraph, TensorSpec
from llmpack.models.tables import Sizes
from llmpack.runtime.settings import RuntimeSettings

KV_BYTES = {"f16": 2.0, "q8_0": 34 / 32, "q5_0": 22 / 32, "q4_0": 18 / 32}
"""Bytes of one number in the KV cache."""
CONTEXT_PADDING = 256
MIB = 1 << 20

# Which encodings are repacked, by what the processor can do, and how many rows a repacked group has.
_REPACKED_ON_AVX2 = {"q4_0": 8, "q4_k": 8, "iq4_nl": 8}
_REPACKED_ON_AVX512 = {"q2_k": 8}
_REPACKED_ON_DOTPROD = {"q4_0": 4, "q4_k": 8, "q5_k": 8, "q6_k": 8, "q8_0": 4, "iq4_nl": 4}
_REPACKED_ON_RVV = {"q4_0": 16, "q4_k": 16, "q2_k": 16, "iq4_nl": 16, "q8_0": 16}  # with 256-bit vectors

_RUNTIME_BASE = 24 * MIB
"""Interpreter and libraries of the runtime's process, half of it pages of files."""
_PER_TOKEN_OF_VOCABULARY = 300
"""Bytes that llama.cpp's tokenizer keeps for each token: texts, merges and their tables."""
_PER_BLOCK = 45 << 10
_SCRATCH_BASE = 1.4 * MIB


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


def weights(graph: ModelGraph, instruction_sets: frozenset[str]) -> Weights:
    """The weights of a graph as it stands in the file.

    An embedding that is also the output head is looked up in its stored order and multiplied in the
    repacked one, so it stands in memory twice even where the file is not mapped.
    """
    rows = repacked_rows(instruction_sets)
    tied = not any(spec.part == "output" for spec in graph.tensors)
    copies = [s for s in graph.tensors if _is_repacked(s, rows) and (s.part != "embedding" or tied)]
    return Weights(
        stored=graph.nbytes,
        repacked=sum(s.nbytes for s in copies),
        replaced=sum(s.nbytes for s in copies if s.part != "embedding"),
    )


def _is_repacked(spec: TensorSpec, rows: Mapping[str, int]) -> bool:
    return len(spec.shape) == 2 and spec.encoding in rows and spec.shape[0] % rows[spec.encoding] == 0


def padded(context: int) -> int:
    """The context that llama.cpp really allocates."""
    return -(-context // CONTEXT_PADDING) * CONTEXT_PADDING


def cache_tokens(config: Mapping[str, Any], settings: RuntimeSettings, context: int) -> tuple[int, ...]:
    """Tokens that the KV cache holds for each block: all, or a window and one batch where the runtime has windows."""
    family = family_of(config)
    window = family.window(config) if family.runs_windows else None
    full = padded(context)
    short = full if window is None else padded(min(full, window + settings.ubatch))
    return tuple(short if kind == "sliding" else full for kind in family.block_kinds(config))


def cache_bytes(config: Mapping[str, Any], settings: RuntimeSettings, context: int) -> int:
    """Bytes of the KV cache, keys and values of every block."""
    numbers = 2 * family_of(config).sizes(config).kv_rows * sum(cache_tokens(config, settings, context))
    return int(numbers * KV_BYTES[settings.kv])


def scratch_bytes(sizes: Sizes, settings: RuntimeSettings, context: int) -> int:
    """Bytes of the compute buffer that a run touches while it reads a prompt of the full context."""
    tokens = min(settings.ubatch, context)
    seen = padded(context)
    activations = max(2.5 * sizes.ffn + 7.4 * sizes.hidden - 3.4 * sizes.q_rows, 2.5 * sizes.ffn)
    rows = 4 * activations + 2.4 * seen
    if settings.flash_attention == "off":  # all scores in f32, their softmax again in f16
        rows = max(rows, 6.0 * seen * sizes.heads + 4 * 8 * sizes.hidden)
    inputs_of_kernels = 1.125 * sizes.ffn  # rows rounded to 8 bits for the integer kernels
    return int(tokens * (rows + inputs_of_kernels) + _SCRATCH_BASE)


def base_bytes(sizes: Sizes) -> int:
    """Bytes of the process beside the model: interpreter, libraries, tokenizer, graph."""
    return _RUNTIME_BASE + _PER_TOKEN_OF_VOCABULARY * sizes.vocab + _PER_BLOCK * sizes.blocks
