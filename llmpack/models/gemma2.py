"""Gemma 2: norms before and after attention and feed-forward, capped scores and logits, every other block a window.

Gemma team 2024, arXiv:2408.00118
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from llmpack.errors import Problem
from llmpack.models.family import Family
from llmpack.models.tables import Row, Setting, Sizes, TokenizerRules


class Gemma2(Family):
    """`Gemma2ForCausalLM`.

    Norms multiply by one plus their weight; a GGUF file holds the sum. Where the windows are, how scores are scaled
    and the base of the rotary embedding are not in a file but built into llama.cpp, so other values are refused.
    """

    name = "gemma2"
    architectures = ("Gemma2ForCausalLM",)
    model_type = "gemma2"
    gguf_arch = "gemma2"

    outside: ClassVar[tuple[Row, ...]] = (
        Row("model.embed_tokens.weight", "embedding", ("vocab", "hidden"), "token_embd.weight"),
        Row("model.norm.weight", "norm", ("hidden",), "output_norm.weight"),
    )
    block: ClassVar[tuple[Row, ...]] = (
        Row("input_layernorm.weight", "norm", ("hidden",), "attn_norm.weight"),
        Row("self_attn.q_proj.weight", "attention.q", ("q_rows", "hidden"), "attn_q.weight", "attention.in"),
        Row("self_attn.k_proj.weight", "attention.k", ("kv_rows", "hidden"), "attn_k.weight", "attention.in"),
        Row("self_attn.v_proj.weight", "attention.v", ("kv_rows", "hidden"), "attn_v.weight", "attention.in"),
        Row("self_attn.o_proj.weight", "attention.o", ("hidden", "q_rows"), "attn_output.weight", "attention.out"),
        Row("post_attention_layernorm.weight", "norm", ("hidden",), "post_attention_norm.weight"),
        Row("pre_feedforward_layernorm.weight", "norm", ("hidden",), "ffn_norm.weight"),
        Row("mlp.gate_proj.weight", "ffn.gate", ("ffn", "hidden"), "ffn_gate.weight", "ffn.in"),
        Row("mlp.up_proj.weight", "ffn.up", ("ffn", "hidden"), "ffn_up.weight", "ffn.in"),
        Row("mlp.down_proj.weight", "ffn.down", ("hidden", "ffn"), "ffn_down.weight", "ffn.out"),
        Row("post_feedforward_layernorm.weight", "norm", ("hidden",), "post_ffw_norm.weight"),
    )
    defaults: ClassVar[Mapping[str, Any]] = {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }

    activation = ("hidden_activation", "gelu_pytorch_tanh")
    without: ClassVar[tuple[str, ...]] = ("attention_bias", "use_bidirectional_attention")
    rope_kinds: ClassVar[tuple[str, ...]] = ("default",)
    states_rope: ClassVar[bool] = False
    settings: ClassVar[tuple[Setting, ...]] = (
        Setting("attn_logit_softcapping", "attn_logit_softcapping"),
        Setting("final_logit_softcapping", "final_logit_softcapping"),
        Setting("attention.sliding_window", "sliding_window", int),
    )
    norm_offset = 1.0
    layered = True
    runs_windows = True
    tokenizer = TokenizerRules(space_prefix="never")

    every: ClassVar[int] = 2
    """The last of so many blocks sees everything, the others a window; so in llama.cpp."""
    scaled_by_width: ClassVar[int] = 46
    """With so many blocks (27B) llama.cpp scales scores by hidden size over heads, otherwise by the heads' width."""

    def window(self, config: Mapping[str, Any]) -> int | None:
        """As the config says."""
        window: int | None = self.setting(config, "sliding_window")
        return window

    def kind(self, config: Mapping[str, Any], index: int) -> str:
        """Windows, with everything in sight at regular places."""
        return "sliding" if (index + 1) % self.every else "full"

    def embedding_scale(self, config: Mapping[str, Any]) -> float:
        """The root of the hidden size."""
        return float(self.sizes(config).hidden ** 0.5)

    def scaled_by(self, sizes: Sizes) -> int:
        """The number by whose square root llama.cpp divides scores."""
        return sizes.hidden // sizes.heads if sizes.blocks == self.scaled_by_width else sizes.head_dim

    def implied(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """How scores are scaled."""
        return {"query_pre_attn_scalar": self.scaled_by(self._sizes(config))}

    def oddities(self, config: Mapping[str, Any], sizes: Sizes) -> list[Problem]:
        """What llama.cpp has built in and a config may not change."""
        scalar, here = self.setting(config, "query_pre_attn_scalar"), self.scaled_by(sizes)
        found = [("query_pre_attn_scalar", f"{scalar!r}; llama.cpp has {here} built in")] if scalar != here else []
        if "untied" not in {row.when for row in self.outside} and not self.setting(config, "tie_word_embeddings"):
            found.append(("tie_word_embeddings", "false; llama.cpp takes the embedding for the head"))
        if not self.runs_pattern(self._kinds(config, sizes.blocks)):
            found.append(
                ("layer_types", f"not full attention in every {self.every}. block, which llama.cpp has built in")
            )
        return [Problem(f"{key} is {what}", key, "config.json", rule="unsupported-config") for key, what in found]

    def runs_pattern(self, kinds: tuple[str, ...]) -> bool:
        """Whether llama.cpp sees windows in the same blocks."""
        return kinds == tuple(self.kind({}, index) for index in range(len(kinds)))
