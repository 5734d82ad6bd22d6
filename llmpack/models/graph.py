"""ModelGraph: a family applied to a config. Every tensor with its part, shape and encoding; no data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from llmpack.encodings import ENCODINGS


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a model.

    name       in the checkpoint ("model.layers.0.self_attn.q_proj.weight")
    part       what it is, the word recipes use: embedding, output, norm, rope, bias,
               attention.q, attention.k, attention.v, attention.o, ffn.gate, ffn.up, ffn.down;
               attention.qkv and ffn.gate_up where a model has them in one matrix
    shape      as in the checkpoint, [rows, columns] for matrices
    gguf_name  in a GGUF file ("blk.0.attn_q.weight"), or None where GGUF has none
    encoding   how it is stored now
    block      index of the block it belongs to, None outside the blocks
    inputs     name of the input that it reads, shared by matrices with one Hessian
               ("attention.in", "attention.out", "ffn.in", "ffn.out"); None if it is no linear map
    row_order  name of the row permutation between checkpoint and GGUF ("rope"), None for none
    axes       what each axis counts: names of sizes (see `llmpack.models.tables.Sizes`)
    """

    name: str
    part: str
    shape: tuple[int, ...]
    gguf_name: str | None
    encoding: str
    block: int | None = None
    inputs: str | None = None
    row_order: str | None = None
    axes: tuple[str, ...] = ()

    @property
    def is_linear(self) -> bool:
        """True for a matrix inside a block that quantizers may round."""
        return self.inputs is not None

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes under its encoding."""
        return _nbytes(self.encoding, self.shape)


@cache
def _nbytes(encoding: str, shape: tuple[int, ...]) -> int:
    """A model has few different shapes, and a plan asks for the size of every tensor many times."""
    return ENCODINGS.load(encoding)().nbytes(shape)


@dataclass(frozen=True)
class ModelGraph:
    """All tensors of a model in checkpoint order, and the config that they follow from."""

    family: str
    config: Mapping[str, Any]
    tensors: tuple[TensorSpec, ...]
    _by_name: dict[str, TensorSpec] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {t.name: t for t in self.tensors})

    def __getitem__(self, name: str) -> TensorSpec:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    @property
    def block_count(self) -> int:
        """Number of blocks."""
        return 1 + max((t.block for t in self.tensors if t.block is not None), default=-1)

    def block(self, index: int) -> tuple[TensorSpec, ...]:
        """The tensors of one block."""
        return tuple(t for t in self.tensors if t.block == index)

    def input_groups(self, index: int) -> dict[str, tuple[TensorSpec, ...]]:
        """The matrices of one block by the input that they read, in the order in which a forward pass meets them.

        The matrices of a group have one Hessian and can be rounded together.
        """
        groups: dict[str, tuple[TensorSpec, ...]] = {}
        for spec in self.block(index):
            if spec.inputs is not None:
                groups[spec.inputs] = (*groups.get(spec.inputs, ()), spec)
        return groups

    @property
    def outside(self) -> tuple[TensorSpec, ...]:
        """The tensors outside the blocks: embedding, last norm, output."""
        return tuple(t for t in self.tensors if t.block is None)

    @property
    def parts(self) -> tuple[str, ...]:
        """Every part that occurs, in order of first appearance."""
        return tuple(dict.fromkeys(t.part for t in self.tensors))

    @property
    def parameters(self) -> int:
        """Numbers in the whole model; a tied head is not counted twice."""
        return sum(t.parameters for t in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors under their encodings, without container overhead."""
        return sum(t.nbytes for t in self.tensors)

    def with_encodings(self, choose: Callable[[TensorSpec], str]) -> ModelGraph:
        """The same model with other encodings."""
        return replace(self, tensors=tuple(replace(t, encoding=choose(t)) for t in self.tensors))

    def with_tensors(self, config: Mapping[str, Any], tensors: Iterable[TensorSpec]) -> ModelGraph:
        """The graph after surgery: another config and the tensors that follow from it."""
        return replace(self, config=config, tensors=tuple(tensors))
