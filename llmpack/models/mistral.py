"""Mistral 7B v0.1 to v0.3 and Nemo: Llama's tensors, and in v0.1 a sliding window.

Jiang et al. 2023, arXiv:2310.06825
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from llmpack.errors import Problem
from llmpack.models.llama import Llama
from llmpack.models.tables import Sizes
from llmpack.models.validity import window_problems


class Mistral(Llama):
    """`MistralForCausalLM`. GGUF knows it as llama, as llama.cpp's converter writes it."""

    name = "mistral"
    architectures = ("MistralForCausalLM",)
    model_type = "mistral"
    from_gguf = False  # the file does not tell Mistral from Llama, nor does the arithmetic without a window

    defaults: ClassVar[Mapping[str, Any]] = {
        **Llama.defaults,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    }

    without = ("attention_bias", "mlp_bias")

    def window(self, config: Mapping[str, Any]) -> int | None:
        """Tokens that a block looks back on, or None where it sees everything."""
        window: int | None = self.setting(config, "sliding_window")
        return window

    def kind(self, config: Mapping[str, Any], index: int) -> str:
        """All alike: sliding or full."""
        return "full" if self.window(config) is None else "sliding"

    def oddities(self, config: Mapping[str, Any], sizes: Sizes) -> list[Problem]:
        """A window is a positive number or null."""
        return window_problems(self.window(config))
