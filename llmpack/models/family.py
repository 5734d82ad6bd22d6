"""Family: what the tensors of a model mean. One page of data per family, and its oddities.

A family knows names, parts, shapes, which matrices read the same input, and what GGUF calls everything; it
needs config.json alone and no torch, so that a plan can be made from headers. How a block computes is
transformers' business (`llmpack.models.forward`); a test holds the two together.

A tensor has three names: in the checkpoint (`TensorSpec.name`), in transformers' module
(`Family.module_name`) and in GGUF (`TensorSpec.gguf_name`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from llmpack.errors import InputRejected, Problem
from llmpack.models.gguf_config import read_config
from llmpack.models.graph import ModelGraph, TensorSpec
from llmpack.models.rope import Rope, read_rope

STORED = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""Names of torch's float types in config.json, and of the encodings that they are."""


@dataclass(frozen=True)
class Row:
    """One line of a family's table.

    name       of the tensor, below the block's path for the rows of a block
    part       the word recipes use (see `TensorSpec.part`)
    shape      names of sizes (see `Sizes`), one per axis
    gguf       name in a GGUF file, below ``blk.N.`` for the rows of a block; None where GGUF has none
    inputs     name of the input it reads, for a linear map
    row_order  name of the permutation of rows between checkpoint and GGUF
    when       the flag of the config without which the tensor does not exist
    """

    name: str
    part: str
    shape: tuple[str, ...]
    gguf: str | None
    inputs: str | None = None
    row_order: str | None = None
    when: str | None = None


@dataclass(frozen=True)
class Sizes:
    """The numbers of a config that shapes follow from."""

    vocab: int
    hidden: int
    ffn: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def q_rows(self) -> int:
        """Rows of the query projection."""
        return self.heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        """Rows of the key and of the value projection."""
        return self.kv_heads * self.head_dim


LIMITS = {
    "vocab_size": 1 << 22,
    "hidden_size": 131_072,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 1024,
    "max_position_embeddings": 1 << 26,
}
"""Sizes that a config must give (or its family default), each from 1 to a bound that no real model exceeds."""


class Family(ABC):
    """Base of all families of decoders with one embedding, equal blocks and one head.

    name           as users see it
    architectures  what ``architectures`` in config.json may say
    model_type     what ``model_type`` says
    gguf_arch      ``general.architecture`` in a GGUF file, the prefix of its keys
    block_path     where the blocks are, in names of tensors and modules
    version        raise when equal configs would give another graph
    outside        rows outside the blocks: the embedding first
    block          rows of one block, in the order in which a forward pass meets their inputs
    defaults       what transformers assumes where config.json is silent; a test compares
    from_gguf      whether a GGUF file of `gguf_arch` is taken for this family
    """

    name: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    model_type: ClassVar[str]
    gguf_arch: ClassVar[str]
    block_path: ClassVar[str] = "model.layers"
    version: ClassVar[int] = 1
    outside: ClassVar[tuple[Row, ...]]
    block: ClassVar[tuple[Row, ...]]
    defaults: ClassVar[Mapping[str, Any]]
    from_gguf: ClassVar[bool] = True

    # --- the config

    @abstractmethod
    def flags(self, config: Mapping[str, Any]) -> Collection[str]:
        """The words of `Row.when` that hold for a config."""

    @abstractmethod
    def oddities(self, config: Mapping[str, Any]) -> list[Problem]:
        """What this family cannot do with a config, beyond sizes and rotary embedding."""

    def setting(self, config: Mapping[str, Any], key: str) -> Any:
        """A value of the config, or the family's default where the config is silent."""
        return config[key] if key in config else self.defaults.get(key)

    def _size(self, config: Mapping[str, Any], key: str) -> Any:
        value = self.setting(config, key)
        if value is None and key == "num_key_value_heads":
            return self._size(config, "num_attention_heads")
        if value is None and key == "head_dim":
            hidden, heads = self._size(config, "hidden_size"), self._size(config, "num_attention_heads")
            return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None
        return value

    def problems(self, config: Mapping[str, Any]) -> list[Problem]:
        """Everything that stops this family from working with a config; empty when it can."""
        found = []
        for key, most in LIMITS.items():
            value = self._size(config, key)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                text = "is missing" if value is None else f"is {value!r}, not a whole number from 1 to {most}"
                found.append(Problem(f"{key} {text}", key, "config.json", rule="config-range"))
        eps = self.setting(config, "rms_norm_eps")
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
            found.append(Problem(f"rms_norm_eps is {eps!r}", "rms_norm_eps", "config.json", rule="config-range"))
        if not found:
            sizes = self._sizes(config)
            if sizes.heads % sizes.kv_heads:
                text = f"{sizes.heads} heads cannot share {sizes.kv_heads} key and value heads evenly"
                found.append(Problem(text, "num_key_value_heads", "config.json", rule="config-range"))
            if sizes.head_dim % 2:
                text = f"heads of {sizes.head_dim} cannot be rotated in pairs"
                found.append(Problem(text, "head_dim", "config.json", rule="config-range"))
        return found + read_rope(config, self.defaults["rope_theta"])[1] + self.oddities(config)

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises InputRejected with every problem of a config."""
        found = self.problems(config)
        if found:
            raise InputRejected(found)

    def _sizes(self, config: Mapping[str, Any]) -> Sizes:
        return Sizes(
            vocab=self._size(config, "vocab_size"),
            hidden=self._size(config, "hidden_size"),
            ffn=self._size(config, "intermediate_size"),
            blocks=self._size(config, "num_hidden_layers"),
            heads=self._size(config, "num_attention_heads"),
            kv_heads=self._size(config, "num_key_value_heads"),
            head_dim=self._size(config, "head_dim"),
        )

    def sizes(self, config: Mapping[str, Any]) -> Sizes:
        """The sizes of a config. Raises InputRejected as `check` does."""
        self.check(config)
        return self._sizes(config)

    def rope(self, config: Mapping[str, Any]) -> Rope:
        """The rotary embedding of a config. Raises InputRejected as `check` does."""
        self.check(config)
        return read_rope(config, self.defaults["rope_theta"])[0]

    @abstractmethod
    def config_of_names(self, names: Collection[str]) -> Mapping[str, Any]:
        """The settings of a config that a GGUF file says by having certain tensors: biases, tied heads."""

    def block_kinds(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """What kind of attention each block has; blocks may be dropped freely where all are equal."""
        return ("full",) * self.sizes(config).blocks

    def notes(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """What a user should know: where the GGUF runtime will not compute what the model does."""
        return ()

    # --- the tensors

    def module_name(self, name: str) -> str:
        """The name that transformers' module gives to a tensor of the checkpoint."""
        return name

    def graph(self, config: Mapping[str, Any], encodings: Mapping[str, str] | None = None) -> ModelGraph:
        """Every tensor that a config implies.

        encodings  how each tensor is stored; without it all are as ``dtype`` in the config says (f32 when silent).

        Raises InputRejected as `check` does, KeyError for a tensor that `encodings` lacks.
        """
        sizes, flags = self.sizes(config), self.flags(config)
        stored = STORED.get(str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch."), "f32")

        def spec(row: Row, path: str, gguf_path: str, block: int | None) -> TensorSpec:
            name = path + row.name
            return TensorSpec(
                name=name,
                part=row.part,
                shape=tuple(getattr(sizes, axis) for axis in row.shape),
                gguf_name=None if row.gguf is None else gguf_path + row.gguf,
                encoding=stored if encodings is None else encodings[name],
                block=block,
                inputs=row.inputs,
                row_order=row.row_order,
            )

        def exists(row: Row) -> bool:
            return row.when is None or row.when in flags

        before, *after = [spec(row, "", "", None) for row in self.outside if exists(row)]
        blocks = [
            spec(row, f"{self.block_path}.{index}.", f"blk.{index}.", index)
            for index in range(sizes.blocks)
            for row in self.block
            if exists(row)
        ]
        return ModelGraph(self.name, dict(config), (before, *blocks, *after))

    def row_order(self, spec: TensorSpec, config: Mapping[str, Any]) -> np.ndarray | None:
        """[rows] int64: row i of the GGUF tensor is row ``order[i]`` of the checkpoint's; None where they agree.

        "rope": checkpoints pair feature i with i + head_dim / 2, ggml's kernels for these families pair
        neighbours, so the two halves of every head of q and k are interleaved.
        """
        if spec.row_order is None:
            return None
        if spec.row_order != "rope":
            raise ValueError(f"{spec.name}: no row order is called {spec.row_order!r}")
        rows, head_dim = spec.shape[0], self._size(config, "head_dim")
        halves = np.arange(rows, dtype=np.int64).reshape(rows // head_dim, 2, head_dim // 2)
        return halves.swapaxes(1, 2).reshape(rows)

    # --- GGUF

    def hyperparameters(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of the architecture that llama.cpp's converter writes for a config, in its order.

        int stands for GGUF's UINT32, float for FLOAT32, str for STRING. ``general.*``, among it the file type, and
        ``tokenizer.*`` are the format's.
        """
        sizes, rope, arch = self.sizes(config), self.rope(config), self.gguf_arch
        keys: dict[str, Any] = {
            f"{arch}.block_count": sizes.blocks,
            f"{arch}.context_length": self._size(config, "max_position_embeddings"),
            f"{arch}.embedding_length": sizes.hidden,
            f"{arch}.feed_forward_length": sizes.ffn,
            f"{arch}.attention.head_count": sizes.heads,
            f"{arch}.attention.head_count_kv": sizes.kv_heads,
        }
        if rope.kind == "linear":
            keys |= {f"{arch}.rope.scaling.type": "linear", f"{arch}.rope.scaling.factor": rope.factor}
        return keys | {
            f"{arch}.rope.freq_base": rope.theta,
            f"{arch}.attention.layer_norm_rms_epsilon": float(self.setting(config, "rms_norm_eps")),
            f"{arch}.attention.key_length": sizes.head_dim,
            f"{arch}.attention.value_length": sizes.head_dim,
        }

    def extra_tensors(self, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Tensors of a GGUF file that no checkpoint has, float32 (`Rope.divisors`)."""
        divisors = self.rope(config).divisors(self.sizes(config).head_dim)
        return {} if divisors is None else {"rope_freqs.weight": divisors}

    def config_from_gguf(self, metadata: Mapping[str, Any], divisors: np.ndarray | None = None) -> dict[str, Any]:
        """A config.json whose `hyperparameters` and `extra_tensors` are those of a GGUF file.

        metadata  of the file
        divisors  its ``rope_freqs.weight``, float32, where there is one

        Whether heads are tied and biases exist is in the names of the tensors (`config_of_names`).
        Raises InputRejected for keys of the architecture that say something else than this family can.
        """
        return read_config(self, metadata, divisors)
