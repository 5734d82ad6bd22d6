"""Outline: what memory and speed of a model follow from, read from a graph or from the header of any GGUF file.

A `ModelGraph` exists only for the families that llmpack packs; a budget is judged for files of any architecture.
So the estimate looks at an outline: the tensors with their bytes, and the numbers that each block keeps for a token.
Where an architecture keeps something else (a state, compressed keys, windows in an unknown pattern) the outline says
so, and its memory is not estimated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.encodings import ENCODINGS
from llmpack.errors import InputRejected, Problem
from llmpack.models import FAMILIES, family_of
from llmpack.models.family import Family
from llmpack.models.graph import ModelGraph

_PARTS = {
    "token_embd": "embedding", "output": "output", "output_norm": "norm",
    "attn_q": "attention.q", "attn_k": "attention.k", "attn_v": "attention.v", "attn_output": "attention.o",
    "attn_qkv": "attention.qkv", "ffn_gate": "ffn.gate", "ffn_up": "ffn.up", "ffn_down": "ffn.down",
}  # fmt: skip
NOT_ESTIMATED = "what transformers takes and gives of such a model is measured, not estimated"
SPEED_NOT_ESTIMATED = "the speed of transformers is measured, not estimated"
_NAME = re.compile(r"(?:blk\.(?P<block>\d+)\.)?(?P<stem>.+?)(?P<suffix>\.weight|\.bias)?")
_OTHER_MEMORY = ("ssm_", "attn_kv_a", "attn_kv_b", "time_mix", "shortconv", "indexer")
"""Stems of tensors of blocks that keep something else than keys and values: states, compressed keys."""


@dataclass(frozen=True)
class Stored:
    """One tensor as it lies in the file.

    part   the word recipes use, or the file's own word where they have none
    block  index of its block, None outside
    share  of its bytes that one token reads: of experts, only those that are asked
    """

    name: str
    part: str
    shape: tuple[int, ...]
    encoding: str
    nbytes: int
    block: int | None = None
    share: float = 1.0

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def is_linear(self) -> bool:
        """A matrix inside a block that a token is multiplied with."""
        return self.block is not None and len(self.shape) > 1

    def encoded(self, encoding: str) -> Stored:
        """The same tensor under another encoding."""
        return replace(self, encoding=encoding, nbytes=ENCODINGS.load(encoding)().nbytes(self.shape))


@dataclass(frozen=True)
class Kept:
    """What the KV cache of one block holds.

    numbers  for each token, keys and values together
    window   tokens that it looks back on, None for all
    """

    numbers: int
    window: int | None = None


@dataclass(frozen=True)
class Loader:
    """How transformers holds a model.

    kernel  what runs the matrices of its blocks: a key of `transformers_memory.KERNELS`, or what nobody measured
    floats  bytes of a number that it computes in
    nbytes  of all tensors in the files
    """

    kernel: str
    floats: int
    nbytes: int


@dataclass(frozen=True)
class Outline:
    """The numbers of a model that its memory and its speed follow from.

    architecture  as GGUF calls it
    verified      whether the memory of this architecture was compared with llama.cpp
    head_rows     rows of the query projection: heads times their width
    kept          what each block's cache holds
    context       tokens that the model was trained for, None where the file does not say
    unmodelled    why memory cannot be estimated; empty where it can
    in_llama      whether llama.cpp runs it, so that its settings and its encodings are cures
    loader        how transformers holds it, where that runs it and the sizes are known
    """

    architecture: str
    verified: bool
    tensors: tuple[Stored, ...]
    vocab: int
    hidden: int
    ffn: int
    heads: int
    head_rows: int
    kept: tuple[Kept, ...]
    context: int | None
    unmodelled: str = ""
    in_llama: bool = True
    loader: Loader | None = None

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.kept)

    @cached_property
    def tied(self) -> bool:
        """Whether the embedding is the output head too."""
        return not any(tensor.part == "output" for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def parts(self) -> tuple[str, ...]:
        """Every part that occurs, in order of first appearance."""
        return tuple(dict.fromkeys(tensor.part for tensor in self.tensors))

    def with_encodings(self, choose: Callable[[Stored], str]) -> Outline:
        """The same model with other encodings."""
        return replace(
            self, tensors=tuple(t if choose(t) == t.encoding else t.encoded(choose(t)) for t in self.tensors)
        )

    def in_transformers(self, loader: Loader) -> Outline:
        """The same model in transformers, of whose speed nothing is computed."""
        return replace(self, unmodelled="", in_llama=False, loader=loader)

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Outline:
        """Of a model of any architecture in transformers: the context of its config.json, nothing to compute from."""
        nested = config.get("text_config")
        text = {**nested, **config} if isinstance(nested, Mapping) else config
        context = text.get("max_position_embeddings")
        return cls(
            architecture=str(config.get("model_type", "")),
            verified=False,
            tensors=(),
            vocab=0,
            hidden=0,
            ffn=0,
            heads=0,
            head_rows=0,
            kept=(),
            context=context if isinstance(context, int) else None,
            unmodelled=NOT_ESTIMATED,
            in_llama=False,
        )

    @classmethod
    def of_graph(cls, graph: ModelGraph) -> Outline:
        """Of a graph as it stands (or will stand) in a GGUF file."""
        family = family_of(graph.config)
        sizes = family.sizes(graph.config)
        window = family.window(graph.config) if family.runs_windows else None
        kinds = family.block_kinds(graph.config)
        return cls(
            architecture=family.gguf_arch,
            verified=True,
            tensors=tuple(
                Stored(t.gguf_name or t.name, t.part, t.shape, t.encoding, t.nbytes, t.block) for t in graph.tensors
            ),
            vocab=sizes.vocab,
            hidden=sizes.hidden,
            ffn=sizes.ffn,
            heads=sizes.heads,
            head_rows=sizes.q_rows,
            kept=tuple(Kept(2 * sizes.kv_rows, window if kind == "sliding" else None) for kind in kinds),
            context=graph.config.get("max_position_embeddings"),
        )

    @classmethod
    def of_gguf(cls, gguf: GgufFile) -> Outline:
        """Of a file of any architecture, from its header. Raises InputRejected where the header lacks a size."""
        keys = _Keys(gguf)
        share = keys.expert_share()
        tensors = tuple(_stored(tensor, share) for tensor in gguf.tensors.values())
        blocks = keys.number("block_count")
        vocab = [t.shape[0] for t in tensors if t.part == "embedding" and len(t.shape) == 2]
        if len(vocab) != 1:
            keys.reject("there is no matrix `token_embd.weight`: this file holds no whole model")
        hidden, heads = keys.number("embedding_length"), keys.largest("attention.head_count", 1)
        head = keys.largest("attention.key_length", hidden // max(heads, 1))
        kept, reason = _kept(tensors, keys, blocks, head)
        return cls(
            architecture=keys.arch,
            verified=keys.family is not None,
            tensors=tensors,
            vocab=vocab[0],
            hidden=hidden,
            ffn=keys.largest("feed_forward_length", 4 * hidden),
            heads=heads,
            head_rows=heads * head,
            kept=kept,
            context=keys.get("context_length"),
            unmodelled=reason or keys.expert_problem(),
        )


class _Keys:
    """The numbers of the architecture in a header."""

    def __init__(self, gguf: GgufFile) -> None:
        self._gguf = gguf
        self.arch = str(gguf.metadata.get("general.architecture", ""))
        self.family = _family(self.arch)

    def reject(self, message: str) -> NoReturn:
        raise InputRejected([Problem(message, where=str(self._gguf.path), rule="gguf-tensor")])

    def get(self, key: str) -> Any:
        return self._gguf.metadata.get(f"{self.arch}.{key}")

    def number(self, key: str) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            found = "missing" if value is None else repr(value)[:40]
            self.reject(f"{self.arch or 'architecture'}.{key} is {found}")
        return int(value)

    def per_block(self, key: str, blocks: int, default: int) -> list[int]:
        """One number for each block: the file has one for all, or an array."""
        value = self.get(key)
        if value is None:
            return [default] * blocks
        if isinstance(value, int):
            return [value] * blocks
        values = [int(one) for one in value]
        return values if len(values) == blocks else [*values, *[default] * blocks][:blocks]

    def largest(self, key: str, default: int) -> int:
        value = self.get(key)
        if value is None:
            return default
        return int(value) if isinstance(value, int) else max((int(one) for one in value), default=default)

    def expert_share(self) -> float:
        count, used = self.largest("expert_count", 0), self.largest("expert_used_count", 0)
        return used / count if 0 < used <= count else 1.0

    def expert_problem(self) -> str:
        if self.largest("expert_count", 0) > 0:
            return f"the scratch memory of experts ({self.arch}) was never compared with llama.cpp"
        return ""


def _family(arch: str) -> Family | None:
    found = {family.gguf_arch: family for _, family in FAMILIES.items() if family.from_gguf}
    return found[arch]() if arch in found else None


def _stored(tensor: Any, share: float) -> Stored:
    match = _NAME.fullmatch(tensor.name)
    assert match is not None  # every name fits: all that follows the stem is optional
    stem, block = match["stem"], int(match["block"]) if match["block"] else None
    part = "bias" if match["suffix"] == ".bias" else _PARTS.get(stem, "norm" if stem.endswith("norm") else stem)
    experts = share if stem.endswith("_exps") else 1.0
    return Stored(tensor.name, part, tensor.shape, tensor.encoding, tensor.nbytes, block, experts)


def _kept(tensors: Iterable[Stored], keys: _Keys, blocks: int, head: int) -> tuple[tuple[Kept, ...], str]:
    """What each block keeps, and why that is not the whole truth where it is not."""
    rows: dict[int, dict[str, int]] = {index: {} for index in range(blocks)}
    for tensor in tensors:
        if tensor.block is None:
            continue
        stem = tensor.name.partition(f"blk.{tensor.block}.")[2]
        if stem.startswith(_OTHER_MEMORY):
            return tuple(Kept(0) for _ in range(blocks)), f"blocks of {keys.arch} keep more than keys and values"
        if tensor.block in rows and len(tensor.shape) == 2:
            rows[tensor.block][tensor.part] = tensor.shape[0]
    numbers = []
    kv_heads = keys.per_block("attention.head_count_kv", blocks, keys.largest("attention.head_count", 1))
    for index in range(blocks):
        found = rows[index]
        if "attention.k" in found and "attention.v" in found:
            numbers.append(found["attention.k"] + found["attention.v"])
        elif "attention.qkv" in found:
            numbers.append(kv_heads[index] * (head + keys.largest("attention.value_length", head)))
        else:
            text = f"block {index} of {keys.arch} has no keys and values of its own"
            return tuple(Kept(0) for _ in range(blocks)), text
    windows, reason = _windows(keys, blocks)
    return tuple(Kept(n, w) for n, w in zip(numbers, windows, strict=True)), reason


def _windows(keys: _Keys, blocks: int) -> tuple[list[int | None], str]:
    """How far each block looks back in llama.cpp, which knows the pattern of each architecture by heart."""
    window = keys.get("attention.sliding_window")
    if not isinstance(window, int) or window <= 0 or (keys.family and not keys.family.runs_windows):
        return [None] * blocks, ""
    if keys.family is None:
        return [None] * blocks, f"which blocks of {keys.arch} have a sliding window is unknown"
    config: Mapping[str, Any] = {"num_hidden_layers": blocks}
    kinds = [keys.family.kind(config, index) for index in range(blocks)]
    return [window if kind == "sliding" else None for kind in kinds], ""
