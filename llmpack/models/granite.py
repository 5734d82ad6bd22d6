"""Granite 3: Llama with four multipliers, of embeddings, scores, what blocks add, and logits.

IBM 2024, https://github.com/ibm-granite/granite-3.0-language-models
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from llmpack.models.llama import Llama
from llmpack.models.tables import Setting


class Granite(Llama):
    """`GraniteForCausalLM`. Logits are divided by their number; scores are multiplied by theirs and nothing else."""

    name = "granite"
    architectures = ("GraniteForCausalLM",)
    model_type = "granite"
    gguf_arch = "granite"

    defaults: ClassVar[Mapping[str, Any]] = {
        **Llama.defaults,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }

    own_head_dim = False
    settings = (
        Setting("attention.scale", "attention_multiplier"),
        Setting("embedding_scale", "embedding_multiplier"),
        Setting("residual_scale", "residual_multiplier"),
        Setting("logit_scale", "logits_scaling"),
    )

    def stated_head_dim(self, config: Mapping[str, Any]) -> int | None:
        """Never stated."""
        return None

    def embedding_scale(self, config: Mapping[str, Any]) -> float:
        """A number of the config."""
        return float(self.setting(config, "embedding_multiplier"))

    def residual_scale(self, config: Mapping[str, Any]) -> float:
        """A number of the config."""
        return float(self.setting(config, "residual_multiplier"))
