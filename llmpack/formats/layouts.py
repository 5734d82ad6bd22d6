"""Layouts: how the tensors of a model lie in a safetensors folder, so that other programs load it.

A layout is the joint between a checkpoint, whose tensors hold floats or the codes of llmpack's encodings, and the names
and types that a loader looks for. It says beforehand, from shapes alone, what it writes for each tensor (`entries`),
and gives the same bytes again whenever it is asked (`pieces`), so that a plan knows the size and the read-back can
compare. `llmpack.formats.safetensors_folder` does the rest: shards, index, config, tokenizer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llmpack.checkpoint.safetensors_header import DTYPE_BYTES
from llmpack.errors import Problem
from llmpack.models.graph import ModelGraph, TensorSpec
from llmpack.registry import Table

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from llmpack.checkpoint.checkpoint import Checkpoint

FLOATS = ("f32", "f16", "bf16")
TORCH_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
"""Float encodings as config.json spells them."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file.

    dtype  as its header spells it ("F16", "U8", "I32")
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class Layout(ABC):
    """How a model is laid out.

    name    as recipes spell it
    floats  encoding of everything that is stored as numbers (f32, f16, bf16); loaders compute in it too
    """

    name: ClassVar[str]

    floats: str = "f16"

    def problem(self, spec: TensorSpec) -> str | None:
        """Why a tensor cannot be written as the steps leave it, with the cure; None if it can."""
        if spec.encoding in FLOATS:
            return None
        return f"it holds {', '.join(FLOATS)}, not {spec.encoding}; leave out the step that quantizes, or write GGUF"

    def graph_problem(self, graph: ModelGraph) -> str | None:
        """Why tensors that can each be written do not go together, with the cure; None if they do."""
        return None

    def option_problems(self, graph: ModelGraph) -> list[Problem]:
        """What is wrong with the options of the layout for this model; `path` names the option in ``[bundle]``."""
        return []

    def require(self) -> None:
        """Raises MissingExtra for a package that writing needs and that is not installed."""
        return

    def require_loader(self) -> None:
        """Raises MissingExtra for a package that reading back needs and that is not installed."""
        return

    def stored_as(self, spec: TensorSpec) -> str:
        """What tables of encodings call the tensor as it is written."""
        return self.floats

    @abstractmethod
    def entries(self, spec: TensorSpec) -> tuple[Entry, ...]:
        """What is written for one tensor of the model; needs no data."""

    @abstractmethod
    def pieces(self, checkpoint: Checkpoint, spec: TensorSpec) -> Iterator[tuple[str, np.ndarray]]:
        """The bytes of those entries: name of an entry, and a run of its bytes (contiguous uint8).

        Runs of one entry follow in order; those of several may alternate. Equal checkpoints give equal bytes.
        Raises NumericalError for numbers that the floats cannot hold.
        """

    @abstractmethod
    def decode(self, read: Callable[[str], Tensor], spec: TensorSpec) -> Tensor:
        """The numbers that a loader will compute with, from what was written: float32 in the tensor's shape.

        read  gives an entry as a tensor of its dtype and shape
        """

    def quantization_config(self, graph: ModelGraph) -> dict[str, Any] | None:
        """``quantization_config`` of config.json, or None."""
        return None

    def files(self, graph: ModelGraph) -> Mapping[str, bytes]:
        """Further small files by name, such as quantize_config.json."""
        return {}


LAYOUTS: Table[type[Layout]] = Table(
    "layout",
    {
        "plain": "llmpack.formats.layout_plain:Plain",
        "bnb-nf4": "llmpack.formats.layout_bnb:BnbNf4",
        "bnb-fp4": "llmpack.formats.layout_bnb:BnbFp4",
        "gptq": "llmpack.formats.layout_gptq:Gptq",
    },
    group="llmpack.layouts",
)
"""The table of layouts. A name is written here once; its class is loaded at first use."""
