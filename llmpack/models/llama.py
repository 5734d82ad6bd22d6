"""Llama 1, 2 and 3, and everything that is built like them under the same name: SmolLM, SmolLM2, TinyLlama.

Touvron et al. 2023, arXiv:2302.13971; Llama team 2024, arXiv:2407.21783
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from llmpack.errors import Problem
from llmpack.models.family import Family
from llmpack.models.tables import Row, Sizes


class Llama(Family):
    """`LlamaForCausalLM`."""

    name = "llama"
    architectures = ("LlamaForCausalLM",)
    model_type = "llama"
    gguf_arch = "llama"

    outside = (
        Row("model.embed_tokens.weight", "embedding", ("vocab", "hidden"), "token_embd.weight"),
        Row("model.norm.weight", "norm", ("hidden",), "output_norm.weight"),
        Row("lm_head.weight", "output", ("vocab", "hidden"), "output.weight", when="untied"),
    )
    block = (
        Row("input_layernorm.weight", "norm", ("hidden",), "attn_norm.weight"),
        Row("self_attn.q_proj.weight", "attention.q", ("q_rows", "hidden"), "attn_q.weight", "attention.in", "rope"),
        Row("self_attn.q_proj.bias", "bias", ("q_rows",), "attn_q.bias", None, "rope", "attention_bias"),
        Row("self_attn.k_proj.weight", "attention.k", ("kv_rows", "hidden"), "attn_k.weight", "attention.in", "rope"),
        Row("self_attn.k_proj.bias", "bias", ("kv_rows",), "attn_k.bias", None, "rope", "attention_bias"),
        Row("self_attn.v_proj.weight", "attention.v", ("kv_rows", "hidden"), "attn_v.weight", "attention.in"),
        Row("self_attn.v_proj.bias", "bias", ("kv_rows",), "attn_v.bias", when="attention_bias"),
        Row("self_attn.o_proj.weight", "attention.o", ("hidden", "q_rows"), "attn_output.weight", "attention.out"),
        Row("self_attn.o_proj.bias", "bias", ("hidden",), "attn_output.bias", when="attention_bias"),
        Row("post_attention_layernorm.weight", "norm", ("hidden",), "ffn_norm.weight"),
        Row("mlp.gate_proj.weight", "ffn.gate", ("ffn", "hidden"), "ffn_gate.weight", "ffn.in"),
        Row("mlp.gate_proj.bias", "bias", ("ffn",), "ffn_gate.bias", when="mlp_bias"),
        Row("mlp.up_proj.weight", "ffn.up", ("ffn", "hidden"), "ffn_up.weight", "ffn.in"),
        Row("mlp.up_proj.bias", "bias", ("ffn",), "ffn_up.bias", when="mlp_bias"),
        Row("mlp.down_proj.weight", "ffn.down", ("hidden", "ffn"), "ffn_down.weight", "ffn.out"),
        Row("mlp.down_proj.bias", "bias", ("hidden",), "ffn_down.bias", when="mlp_bias"),
    )
    defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    }

    rope_kinds: ClassVar[tuple[str, ...]] = ("default", "linear", "llama3")

    def oddities(self, config: Mapping[str, Any], sizes: Sizes) -> list[Problem]:
        """transformers wants this even where heads have a width of their own."""
        if sizes.hidden % sizes.heads == 0:
            return []
        text = (
            f"hidden_size {sizes.hidden} is no multiple of {sizes.heads} heads, which transformers asks of {self.name}"
        )
        return [Problem(text, "num_attention_heads", "config.json", rule="unsupported-config")]

    def stated_head_dim(self, config: Mapping[str, Any]) -> int | None:
        """Always stated, since transformers' config always has it."""
        return self.sizes(config).head_dim

    def hyperparameters(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The common keys, the vocabulary, and the width that is rotated (all of a head)."""
        sizes = self.sizes(config)
        return super().hyperparameters(config) | {
            f"{self.gguf_arch}.vocab_size": sizes.vocab,
            f"{self.gguf_arch}.rope.dimension_count": sizes.head_dim,
        }
