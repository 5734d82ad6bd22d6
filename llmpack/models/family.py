"""Family: what the tensors of a model mean. One page of data per family, and its oddities.

A family knows names, parts, shapes, which matrices read the same input, and what GGUF calls everything; it
needs config.json alone and no torch, so that a plan can be made from headers. How a block computes is
transformers' business (`llmpack.models.forward`); a test holds the two together.

A tensor has three names: in the checkpoint (`TensorSpec.name`), in transformers' module
(`Family.module_name`) and in GGUF (`TensorSpec.gguf_name`).
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from llmpack.errors import InputRejected, Problem
from llmpack.models.gguf_config import read_config
from llmpack.models.graph import ModelGraph, TensorSpec
from llmpack.models.rope import Rope, read_rope
from llmpack.models.tables import LIMITS, Row, Setting, Sizes, TokenizerRules
from llmpack.models.validity import (
    epsilon_problems,
    head_problems,
    layer_type_problems,
    setting_problems,
    size_problems,
)

if TYPE_CHECKING:
    import numpy as np
else:
    from llmpack.lazy import LazyModule

    np = LazyModule("numpy")

STORED = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""Names of torch's float types in config.json, and of the encodings that they are."""


RUNTIME_THETA = 10_000.0
"""The base of the rotary embedding that llama.cpp takes where a file is silent."""

KINDS = {"full_attention": "full", "sliding_attention": "sliding"}
"""What ``layer_types`` in config.json may say, and what `Family.block_kinds` calls it."""


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

    What llama.cpp can do for the architecture:

    activation     key of the config and the one value that is built in
    without        settings that must be off: there is no place for them
    rope_kinds     rotary scalings (see `llmpack.models.rope`)
    partial_rope   whether heads may be rotated in part
    states_rope    whether a file states the base of the rotary embedding
    own_head_dim   whether heads may be of another width than hidden size over heads
    settings       numbers that the file states beside the sizes
    norm_offset    what the weights of norms in a file have more than those in a checkpoint
    layered        whether ``layer_types`` says which blocks see a window only
    per_block      lists of a config that have one entry for each block
    runs_windows   whether windows are applied
    tokenizer      how the converter reads the tokenizer files
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

    activation: ClassVar[tuple[str, str]] = ("hidden_act", "silu")
    without: ClassVar[tuple[str, ...]] = ()
    rope_kinds: ClassVar[tuple[str, ...]] = ("default", "linear")
    partial_rope: ClassVar[bool] = False
    states_rope: ClassVar[bool] = True
    own_head_dim: ClassVar[bool] = True
    settings: ClassVar[tuple[Setting, ...]] = ()
    norm_offset: ClassVar[float] = 0.0
    layered: ClassVar[bool] = False
    per_block: ClassVar[tuple[str, ...]] = ("layer_types", "no_rope_layers")
    runs_windows: ClassVar[bool] = False
    tokenizer: ClassVar[TokenizerRules] = TokenizerRules()

    # --- the config

    def flags(self, config: Mapping[str, Any]) -> Collection[str]:
        """The words of `Row.when` that hold for a config: keys that are on, and "untied" for a head of its own."""
        words = {row.when for row in (*self.outside, *self.block) if row.when is not None}
        on = {word for word in words - {"untied"} if self.setting(config, word)}
        return on if self.setting(config, "tie_word_embeddings") else on | (words & {"untied"})

    def config_of_names(self, names: Collection[str]) -> Mapping[str, Any]:
        """The settings of a config that a GGUF file says by having certain tensors: biases, tied heads."""
        places = [("", row) for row in self.outside] + [("blk.0.", row) for row in self.block]
        found = {row.when: False for _, row in places if row.when is not None}
        for path, row in places:
            if row.when is not None and row.gguf is not None and path + row.gguf in names:
                found[row.when] = True
        config: dict[str, Any] = {key: value for key, value in found.items() if key != "untied"}
        return config | ({"tie_word_embeddings": not found["untied"]} if "untied" in found else {})

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
        found = size_problems({key: self._size(config, key) for key in LIMITS})
        if not found:
            sizes = self._sizes(config)
            found += head_problems(sizes, own_width=self.own_head_dim, name=self.name)
            layers = layer_type_problems(config.get("layer_types"), sizes.blocks, KINDS) if self.layered else []
            found += layers or self.oddities(config, sizes)
        found += epsilon_problems(self.setting(config, "rms_norm_eps"))
        values = {s: (self.setting(config, s.config), self.defaults.get(s.config)) for s in self.settings}
        found += setting_problems(values) + self._unsupported(config)
        rope, problems = self.read_rope(config)
        if not problems and not self.states_rope and rope.theta != RUNTIME_THETA:
            text = f"rope_theta is {rope.theta:g}; llama.cpp has {RUNTIME_THETA:g} built in for {self.name}"
            problems = [Problem(text, "rope_theta", "config.json", rule="unsupported-config")]
        return found + problems

    def _unsupported(self, config: Mapping[str, Any]) -> list[Problem]:
        key, built_in = self.activation
        said = {key: self.setting(config, key)} if self.setting(config, key) != built_in else {}
        said |= {name: config[name] for name in self.without if config.get(name)}
        only = {key: f"; supported: {built_in}"}
        return [
            Problem(
                f"{key} {value!r} is not supported for {self.name}{only.get(key, '')}",
                key,
                "config.json",
                rule="unsupported-config",
            )
            for key, value in said.items()
        ]

    def oddities(self, config: Mapping[str, Any], sizes: Sizes) -> list[Problem]:
        """What this family cannot do with a config whose sizes are sound, beyond what its data say."""
        return []

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

    def read_rope(self, config: Mapping[str, Any]) -> tuple[Rope, list[Problem]]:
        """The rotary embedding of a config and what is wrong with it."""
        return read_rope(config, self.defaults["rope_theta"], self.rope_kinds, partial=self.partial_rope)

    def rope(self, config: Mapping[str, Any]) -> Rope:
        """The rotary embedding of a config. Raises InputRejected as `check` does."""
        self.check(config)
        return self.read_rope(config)[0]

    # --- patterns over blocks

    def window(self, config: Mapping[str, Any]) -> int | None:
        """Tokens that a sliding block looks back on, itself included; None where no block slides."""
        return None

    def kind(self, config: Mapping[str, Any], index: int) -> str:
        """What kind of attention block `index` has where ``layer_types`` does not say."""
        return "full"

    def _kinds(self, config: Mapping[str, Any], blocks: int) -> tuple[str, ...]:
        said = config.get("layer_types") if self.layered else None
        return tuple(KINDS[said[i]] if said else self.kind(config, i) for i in range(blocks))

    def block_kinds(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """What kind of attention each block has: "full", "sliding", or "unrotated" (full, no rotary embedding)."""
        return self._kinds(config, self.sizes(config).blocks)

    def period(self, config: Mapping[str, Any]) -> int:
        """After how many blocks their kinds repeat; 1 where all are equal, their number where nothing repeats."""
        kinds = self.block_kinds(config)
        return next(p for p in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i - p] for i in range(p, len(kinds))))

    def embedding_scale(self, config: Mapping[str, Any]) -> float:
        """By what the rows of the embedding are multiplied where they enter the first block."""
        return 1.0

    def residual_scale(self, config: Mapping[str, Any]) -> float:
        """By what the outputs of attention and feed-forward are multiplied before they are added."""
        return 1.0

    def breaks_pattern(self, config: Mapping[str, Any], dropped: Collection[int]) -> bool:
        """True if the blocks that are left would not repeat as before, so that no config and no runtime fits them."""
        kinds, period = self.block_kinds(config), self.period(config)
        kept = [kind for index, kind in enumerate(kinds) if index not in dropped]
        return kept != [kinds[index % period] for index in range(len(kept))]

    def notes(self, config: Mapping[str, Any], context: int | None = None) -> tuple[str, ...]:
        """What a user should know: where the GGUF runtime will not compute what the model does.

        context  tokens that are to be seen; without it all that the model allows
        """
        window = self.window(config)
        context = context or self.setting(config, "max_position_embeddings")
        sliding = self.block_kinds(config).count("sliding")
        if self.runs_windows or window is None or window >= context or not sliding:
            return ()
        return (
            f"{sliding} blocks of this model attend to the last {window} tokens; llama.cpp has no windows for "
            f"{self.gguf_arch} and attends to all tokens, so beyond a context of {window} the bundle computes "
            "something else than the model",
        )

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
                axes=row.shape,
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

    def stated_head_dim(self, config: Mapping[str, Any]) -> int | None:
        """The width of heads that a file states; None leaves it to be hidden size over heads."""
        value: int | None = self.setting(config, "head_dim")
        return value

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
        if self.states_rope:
            keys[f"{arch}.rope.freq_base"] = rope.theta
        keys[f"{arch}.attention.layer_norm_rms_epsilon"] = float(self.setting(config, "rms_norm_eps"))
        width = self.stated_head_dim(config)
        if width is not None:
            keys |= {f"{arch}.attention.key_length": width, f"{arch}.attention.value_length": width}
        for setting in self.settings:
            value = self.setting(config, setting.config)
            value = setting.null if value is None else value
            if value is not None:
                keys[f"{arch}.{setting.gguf}"] = setting.kind(value)
        return keys

    def extra_tensors(self, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Tensors of a GGUF file that no checkpoint has, float32 (`Rope.tensors`)."""
        return self.rope(config).tensors(self.sizes(config).head_dim)

    def config_from_gguf(self, metadata: Mapping[str, Any], divisors: np.ndarray | None = None) -> dict[str, Any]:
        """A config.json whose `hyperparameters` and `extra_tensors` are those of a GGUF file.

        metadata  of the file
        divisors  its ``rope_freqs.weight``, float32, where there is one

        Whether heads are tied and biases exist is in the names of the tensors (`config_of_names`).
        Raises InputRejected for keys of the architecture that say something else than this family can.
        """
        config = read_config(self, metadata, divisors)
        config |= self.implied(config)
        self.check(config)
        return config

    def implied(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Settings of a config that a GGUF file does not state because llama.cpp has them built in."""
        return {}
