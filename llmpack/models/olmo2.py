"""OLMo 2: norms only after attention and feed-forward, and over all of q and of k before they are split into heads.

OLMo team 2024, arXiv:2501.00656
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from llmpack.models.family import Family
from llmpack.models.tables import Row, TokenizerRules


class Olmo2(Family):
    """`Olmo2ForCausalLM`. llama.cpp wants a head of its own."""

    name = "olmo2"
    architectures = ("Olmo2ForCausalLM",)
    model_type = "olmo2"
    gguf_arch = "olmo2"

    outside = (
        Row("model.embed_tokens.weight", "embedding", ("vocab", "hidden"), "token_embd.weight"),
        Row("model.norm.weight", "norm", ("hidden",), "output_norm.weight"),
        Row("lm_head.weight", "output", ("vocab", "hidden"), "output.weight"),
    )
    block = (
        Row("self_attn.q_proj.weight", "attention.q", ("q_rows", "hidden"), "attn_q.weight", "attention.in"),
        Row("self_attn.k_proj.weight", "attention.k", ("kv_rows", "hidden"), "attn_k.weight", "attention.in"),
        Row("self_attn.v_proj.weight", "attention.v", ("kv_rows", "hidden"), "attn_v.weight", "attention.in"),
        Row("self_attn.q_norm.weight", "norm", ("q_rows",), "attn_q_norm.weight"),
        Row("self_attn.k_norm.weight", "norm", ("kv_rows",), "attn_k_norm.weight"),
        Row("self_attn.o_proj.weight", "attention.o", ("hidden", "q_rows"), "attn_output.weight", "attention.out"),
        Row("post_attention_layernorm.weight", "norm", ("hidden",), "post_attention_norm.weight"),
        Row("mlp.gate_proj.weight", "ffn.gate", ("ffn", "hidden"), "ffn_gate.weight", "ffn.in"),
        Row("mlp.up_proj.weight", "ffn.up", ("ffn", "hidden"), "ffn_up.weight", "ffn.in"),
        Row("mlp.down_proj.weight", "ffn.down", ("hidden", "ffn"), "ffn_down.weight", "ffn.out"),
        Row("post_feedforward_layernorm.weight", "norm", ("hidden",), "post_ffw_norm.weight"),
    )
    defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
    }

    without = ("attention_bias", "tie_word_embeddings")
    own_head_dim = False
    tokenizer = TokenizerRules(space_prefix="unsaid")
