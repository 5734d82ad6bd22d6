"""What transformers takes of memory on a processor, term by term, from shapes alone.

Weights are pages of the mapped files, or were read into memory: their bytes are the same. Kernels of codes keep copies
in an order of their own, or unpack a matrix when it is multiplied with. The cache grows token by token, and each time
keys and values of one block stand in memory twice. A prompt is computed a batch at a time; while a block's queries meet
its keys, these are repeated for every head, unless all heads have keys of their own.

Programs, what kernels copy, and what heaps keep of freed pieces are measured (x86-64 Linux, torch 2.13, transformers
5.8 and 5.23, bitsandbytes 0.50, GPTQModel 7.0) on random models of three shapes, contexts of 512 to 8192. The estimate
of floats and of 4 bits of bitsandbytes is tested on other shapes; that of GPTQ, whose kernels want an environment of
their own, was compared with four bundles of a model of 135 million parameters and was up to 8 % too low.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmpack.checkpoint.config_intake import quantization_method
from llmpack.runtime.settings import RuntimeSettings
from llmpack.target.memory_model import Interval, MemoryEstimate, Term
from llmpack.target.outline import Loader, Outline

MIB = 1 << 20
ERROR, PROGRAMS_ERROR = 0.10, 0.25
"""How wrong the estimate may be, as a share, of what the model adds and of the programs: how many pages of a library
are resident depends on what the system has in its cache, and just after they were written it was 75 MiB more."""


@dataclass(frozen=True)
class Kernel:
    """What runs the matrices of the blocks.

    programs  bytes of interpreter, torch, transformers and the kernel itself
    copied    bytes that it keeps for each of their numbers, beside what the files hold
    unpacked  bytes for each number of the largest of them, while it is multiplied with
    floats    copies of the largest in the type of the model, likewise
    """

    programs: int
    copied: float = 0.0
    unpacked: int = 0
    floats: int = 0


KERNELS: Mapping[str, Kernel] = {
    "floats": Kernel(390 * MIB),
    "bitsandbytes": Kernel(436 * MIB, copied=0.5, floats=3),
    "gptq": Kernel(600 * MIB, unpacked=40),
    "gptq-int4": Kernel(580 * MIB, copied=2.5),
    "gptq-int8": Kernel(600 * MIB, copied=1.0, unpacked=40),
}
EAGER = ("gemma2",)
"""Architectures whose attention keeps the matrix of all scores, since it caps them."""
PER_TOKEN_OF_VOCABULARY = 800
"""Bytes that the tokenizer keeps for each token."""
REPEATED, GROWN = {4: 2.6, 2: 2.9}, {4: 3.0, 2: 6.5}
"""How many times over keys and values of one block are in memory, repeated for all heads, and as they are kept; by the
bytes of a number."""
WIDTHS, INNER_WIDTHS = 4, 2
"""Hidden states, and inner states of a feed-forward part, that are alive at once while a batch runs through a block."""


def loader_of(config: Mapping[str, Any], nbytes: int) -> Loader:
    """How transformers holds a model of this config.json, whose files hold so many bytes of tensors."""
    method = quantization_method(config)
    told = config.get("quantization_config")
    options = told if isinstance(told, Mapping) else {}
    kernel = method or "floats"
    if kernel == "gptq" and options.get("bits") in (4, 8):
        kernel = f"gptq-int{options['bits']}"
    if kernel == "bitsandbytes" and options.get("load_in_8bit"):
        kernel = "bitsandbytes-int8"
    floats = str(config.get("torch_dtype") or config.get("dtype") or "float32")
    return Loader(kernel, 4 if floats == "float32" else 2, nbytes)


def memory(outline: Outline, settings: RuntimeSettings, context: int) -> MemoryEstimate | None:
    """What a model takes in transformers; None where what runs it, or how it attends, was never measured."""
    loader = outline.loader
    if settings.processor != "cpu" or loader is None or loader.kernel not in KERNELS or outline.architecture in EAGER:
        return None
    kernel, floats = KERNELS[loader.kernel], loader.floats
    linear = [tensor.parameters for tensor in outline.tensors if tensor.is_linear]
    copied = int(kernel.copied * sum(linear))
    unpacked = max(linear, default=0) * (kernel.unpacked + kernel.floats * floats)
    cache = floats * sum(kept.numbers * min(context, kept.window or context) for kept in outline.kept)
    terms = (
        Term("weights", loader.nbytes, "as in the files, mapped or read"),
        Term("repacked weights", copied, "copies in the order of the kernel"),
        Term("unpacked matrix", unpacked, "the largest one, while it is multiplied with"),
        Term("KV cache", cache, f"{outline.blocks} blocks x {context} tokens, {floats} bytes a number"),
        Term("attention", _attention(outline, floats, context), "keys and values of one block, repeated and grown"),
        Term("activations", _activations(outline, settings, floats, context), "of a batch of the prompt"),
        Term("tokenizer", PER_TOKEN_OF_VOCABULARY * outline.vocab, f"{outline.vocab} tokens"),
        Term("programs", kernel.programs, "interpreter, torch, transformers, kernels"),
    )
    kept = tuple(term for term in terms if term.nbytes)
    total = sum(term.nbytes for term in kept)
    margin = ERROR * (total - kernel.programs) + PROGRAMS_ERROR * kernel.programs
    return MemoryEstimate("auto", kept, Interval(total - margin, total, total + margin), total)


def _attention(outline: Outline, floats: int, context: int) -> int:
    own = max((kept.numbers for kept in outline.kept), default=0)
    all_heads = 2 * outline.head_rows
    repeated = REPEATED[floats] * all_heads if own < all_heads else 0
    return int(floats * context * (repeated + GROWN[floats] * own))


def _activations(outline: Outline, settings: RuntimeSettings, floats: int, context: int) -> int:
    tokens = min(settings.batch, context)
    return floats * (tokens * (WIDTHS * outline.hidden + INNER_WIDTHS * outline.ffn) + outline.vocab)
