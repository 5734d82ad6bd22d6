"""A small config of every family, with its own oddities switched on and large enough to matter.

Sizes are what a family's real configs have in common with each other: grouped heads, a width of heads that is not
hidden size over heads where the family allows it, as many blocks as its pattern needs. Windows are short and caps low,
so that texts of some dozen tokens feel them.
"""

from __future__ import annotations

from typing import Any

SILENT: dict[str, Any] = {"attention_bias": ..., "mlp_bias": ...}
"""Keys of `tiny_config.TINY` that a family's own config does not have."""

SHORT_FACTORS = [1.0 + 0.05 * i for i in range(6)]
LONG_FACTORS = [1.5 + 0.5 * i for i in range(6)]

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {
        **SILENT,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "head_dim": 32,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "qwen2": {
        **SILENT,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "sliding_window": 32,
        "max_window_layers": 1,
        "torch_dtype": "bfloat16",
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "mlp_bias": ...,
        "head_dim": 32,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "mlp_bias": ...,
        "num_hidden_layers": 4,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "sliding_window": 16,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "mlp_bias": ...,
        "hidden_act": ...,
        "num_hidden_layers": 7,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 16,
        "torch_dtype": "bfloat16",
    },
    "phi3": {
        **SILENT,
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "original_max_position_embeddings": 512,
        "pad_token_id": 0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    },
    "phi3-long": {
        **SILENT,
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "max_position_embeddings": 1024,
        "original_max_position_embeddings": 256,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope", "short_factor": SHORT_FACTORS, "long_factor": LONG_FACTORS},
        "pad_token_id": 0,
        "sliding_window": None,
    },
    "olmo2": {
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        "mlp_bias": ...,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
    },
    "smollm3": {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "num_hidden_layers": 5,
        "rope_theta": 5_000_000.0,
        "pad_token_id": 2,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0, 1],
        "use_sliding_window": False,
        "sliding_window": None,
    },
    "granite": {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.8,
        "logits_scaling": 0.5,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
    },
}
"""By family; overrides of `tiny_config.TINY`, where `...` takes a key away."""

TOKENIZERS: dict[str, str] = {
    **dict.fromkeys(("llama", "qwen3", "olmo2", "smollm3", "granite"), "smollm"),
    **dict.fromkeys(("mistral", "qwen2"), "spm"),
    **dict.fromkeys(("gemma2", "gemma3"), "gemma"),
    **dict.fromkeys(("phi3", "phi3-long"), "phi"),
}
"""The kind of tokenizer that stands beside a checkpoint where it matters (tests/formats/conftest.py)."""
