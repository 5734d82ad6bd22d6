"""Phi-3, Phi-3.5 and Phi-4: q, k and v in one matrix, gate and up in another, long contexts by LongRoPE.

Abdin et al. 2024, arXiv:2404.14219; arXiv:2412.08905
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from llmpack.errors import Problem
from llmpack.models.family import Family
from llmpack.models.rope import Rope
from llmpack.models.tables import Row, Setting, Sizes, TokenizerRules


class Phi3(Family):
    """`Phi3ForCausalLM`. The fused matrices stay fused in a GGUF file: each is one linear map, one input, one encoding.

    A file states the window, and llama.cpp has switched its use off (github.com/ggml-org/llama.cpp/pull/13676).
    """

    name = "phi3"
    architectures = ("Phi3ForCausalLM",)
    model_type = "phi3"
    gguf_arch = "phi3"

    outside = (
        Row("model.embed_tokens.weight", "embedding", ("vocab", "hidden"), "token_embd.weight"),
        Row("model.norm.weight", "norm", ("hidden",), "output_norm.weight"),
        Row("lm_head.weight", "output", ("vocab", "hidden"), "output.weight", when="untied"),
    )
    block = (
        Row("input_layernorm.weight", "norm", ("hidden",), "attn_norm.weight"),
        Row("self_attn.qkv_proj.weight", "attention.qkv", ("qkv_rows", "hidden"), "attn_qkv.weight", "attention.in"),
        Row("self_attn.o_proj.weight", "attention.o", ("hidden", "q_rows"), "attn_output.weight", "attention.out"),
        Row("post_attention_layernorm.weight", "norm", ("hidden",), "ffn_norm.weight"),
        Row("mlp.gate_up_proj.weight", "ffn.gate_up", ("gate_up_rows", "hidden"), "ffn_up.weight", "ffn.in"),
        Row("mlp.down_proj.weight", "ffn.down", ("hidden", "ffn"), "ffn_down.weight", "ffn.out"),
    )
    defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "sliding_window": None,
    }

    rope_kinds = ("default", "longrope")
    partial_rope = True
    own_head_dim = False
    settings = (
        Setting("rope.scaling.original_context_length", "original_max_position_embeddings", int),
        Setting("attention.sliding_window", "sliding_window", int, null=0),
    )
    tokenizer = TokenizerRules(space_prefix="unsaid", added_as_stated=True)

    def stated_head_dim(self, config: Mapping[str, Any]) -> int | None:
        """Never stated."""
        return None

    def read_rope(self, config: Mapping[str, Any]) -> tuple[Rope, list[Problem]]:
        """Older configs call LongRoPE "su" or "yarn"."""
        settings = {**self.defaults, **config}
        table = config.get("rope_scaling") or config.get("rope_parameters")
        if isinstance(table, Mapping) and {table.get("type"), table.get("rope_type")} & {"su", "yarn"}:
            settings["rope_scaling"] = {**table, "type": "longrope", "rope_type": "longrope"}
        return super().read_rope(settings)

    def window(self, config: Mapping[str, Any]) -> int | None:
        """As the config says."""
        window: int | None = self.setting(config, "sliding_window")
        return window

    def kind(self, config: Mapping[str, Any], index: int) -> str:
        """All alike: sliding or full."""
        return "full" if self.window(config) is None else "sliding"

    def oddities(self, config: Mapping[str, Any], sizes: Sizes) -> list[Problem]:
        """One divisor for every pair of features that is rotated."""
        found = []
        rope = self.read_rope(config)[0]
        rotated = rope.rotated(sizes.head_dim)
        if rotated % 2:
            text = f"{rotated} features of a head cannot be rotated in pairs"
            found.append(Problem(text, "partial_rotary_factor", "config.json", rule="config-range"))
        for name, divisors in (("short", rope.short), ("long", rope.long)):
            if rope.kind == "longrope" and len(divisors) != rotated // 2:
                text = f"{name}_factor has {len(divisors)} numbers for {rotated // 2} pairs of features"
                found.append(Problem(text, f"rope_scaling.{name}_factor", "config.json", rule="config-range"))
        return found

    def notes(self, config: Mapping[str, Any], context: int | None = None) -> tuple[str, ...]:
        """Windows, and that llama.cpp chooses between short and long by the context it is opened with."""
        rope, seen = self.rope(config), context or self.setting(config, "max_position_embeddings")
        if rope.kind != "longrope" or seen <= rope.original:
            return super().notes(config, context)
        return (
            *super().notes(config, context),
            f"texts up to {rope.original} tokens are rotated otherwise than longer ones; llama.cpp goes by the context "
            f"that it is opened with, so open it with at most {rope.original} where texts are not longer",
        )

    def hyperparameters(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The common keys, the width that is rotated, and by how much vectors get longer."""
        rope, arch = self.rope(config), self.gguf_arch
        return super().hyperparameters(config) | {
            f"{arch}.rope.dimension_count": rope.rotated(self.sizes(config).head_dim),
            **({f"{arch}.rope.scaling.attn_factor": rope.length} if rope.kind == "longrope" else {}),
        }
