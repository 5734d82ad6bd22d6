"""Qwen3, dense: Qwen2 without biases, with a norm on every head of q and k, and heads of a width of their own.

Yang et al. 2025, arXiv:2505.09388
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from llmpack.models.qwen2 import Qwen2
from llmpack.models.tables import Row


class Qwen3(Qwen2):
    """`Qwen3ForCausalLM`."""

    name = "qwen3"
    architectures = ("Qwen3ForCausalLM",)
    model_type = "qwen3"
    gguf_arch = "qwen3"

    block = (
        Row("input_layernorm.weight", "norm", ("hidden",), "attn_norm.weight"),
        Row("self_attn.q_proj.weight", "attention.q", ("q_rows", "hidden"), "attn_q.weight", "attention.in"),
        Row("self_attn.k_proj.weight", "attention.k", ("kv_rows", "hidden"), "attn_k.weight", "attention.in"),
        Row("self_attn.v_proj.weight", "attention.v", ("kv_rows", "hidden"), "attn_v.weight", "attention.in"),
        Row("self_attn.q_norm.weight", "norm", ("head_dim",), "attn_q_norm.weight"),
        Row("self_attn.k_norm.weight", "norm", ("head_dim",), "attn_k_norm.weight"),
        Row("self_attn.o_proj.weight", "attention.o", ("hidden", "q_rows"), "attn_output.weight", "attention.out"),
        Row("post_attention_layernorm.weight", "norm", ("hidden",), "ffn_norm.weight"),
        Row("mlp.gate_proj.weight", "ffn.gate", ("ffn", "hidden"), "ffn_gate.weight", "ffn.in"),
        Row("mlp.up_proj.weight", "ffn.up", ("ffn", "hidden"), "ffn_up.weight", "ffn.in"),
        Row("mlp.down_proj.weight", "ffn.down", ("hidden", "ffn"), "ffn_down.weight", "ffn.out"),
    )
    defaults: ClassVar[Mapping[str, Any]] = {**Qwen2.defaults, "head_dim": 128, "attention_bias": False}

    without = ("attention_bias",)
    own_head_dim = True
