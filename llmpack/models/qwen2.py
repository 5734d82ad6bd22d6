"""Qwen2 and Qwen2.5, and what is built like them: biases on q, k and v, none elsewhere.

Yang et al. 2024, arXiv:2407.10671; Qwen team 2024, arXiv:2412.15115
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from llmpack.errors import Problem
from llmpack.models.family import Family
from llmpack.models.tables import Row, Sizes, TokenizerRules
from llmpack.models.validity import window_problems


class Qwen2(Family):
    """`Qwen2ForCausalLM`. Windows exist on paper only: no published checkpoint uses them, nor does llama.cpp."""

    name = "qwen2"
    architectures = ("Qwen2ForCausalLM",)
    model_type = "qwen2"
    gguf_arch = "qwen2"

    outside = (
        Row("model.embed_tokens.weight", "embedding", ("vocab", "hidden"), "token_embd.weight"),
        Row("model.norm.weight", "norm", ("hidden",), "output_norm.weight"),
        Row("lm_head.weight", "output", ("vocab", "hidden"), "output.weight", when="untied"),
    )
    block: ClassVar[tuple[Row, ...]] = (
        Row("input_layernorm.weight", "norm", ("hidden",), "attn_norm.weight"),
        Row("self_attn.q_proj.weight", "attention.q", ("q_rows", "hidden"), "attn_q.weight", "attention.in"),
        Row("self_attn.q_proj.bias", "bias", ("q_rows",), "attn_q.bias"),
        Row("self_attn.k_proj.weight", "attention.k", ("kv_rows", "hidden"), "attn_k.weight", "attention.in"),
        Row("self_attn.k_proj.bias", "bias", ("kv_rows",), "attn_k.bias"),
        Row("self_attn.v_proj.weight", "attention.v", ("kv_rows", "hidden"), "attn_v.weight", "attention.in"),
        Row("self_attn.v_proj.bias", "bias", ("kv_rows",), "attn_v.bias"),
        Row("self_attn.o_proj.weight", "attention.o", ("hidden", "q_rows"), "attn_output.weight", "attention.out"),
        Row("post_attention_layernorm.weight", "norm", ("hidden",), "ffn_norm.weight"),
        Row("mlp.gate_proj.weight", "ffn.gate", ("ffn", "hidden"), "ffn_gate.weight", "ffn.in"),
        Row("mlp.up_proj.weight", "ffn.up", ("ffn", "hidden"), "ffn_up.weight", "ffn.in"),
        Row("mlp.down_proj.weight", "ffn.down", ("hidden", "ffn"), "ffn_down.weight", "ffn.out"),
    )
    defaults: ClassVar[Mapping[str, Any]] = {
        "num_key_value_heads": 32,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "max_window_layers": 28,
    }

    own_head_dim: ClassVar[bool] = False
    layered = True
    tokenizer = TokenizerRules(space_prefix="unsaid")

    def window(self, config: Mapping[str, Any]) -> int | None:
        """Only where it is switched on."""
        window: int | None = config.get("sliding_window", 4096)
        return window if self.setting(config, "use_sliding_window") else None

    def kind(self, config: Mapping[str, Any], index: int) -> str:
        """The first blocks see everything."""
        full = self.window(config) is None or index < self.setting(config, "max_window_layers")
        return "full" if full else "sliding"

    def oddities(self, config: Mapping[str, Any], sizes: Sizes) -> list[Problem]:
        """A window is a positive number or null."""
        return window_problems(self.window(config))
