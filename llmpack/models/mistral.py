"""Mistral 7B v0.1 to v0.3 and Nemo: Llama's tensors, and in v0.1 a sliding window.

Jiang et al. 2023, arXiv:2310.06825
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from llmpack.errors import Problem
from llmpack.models.llama import Llama


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

    def window(self, config: Mapping[str, Any]) -> int | None:
        """Tokens that a block looks back on, or None where it sees everything."""
        window = self.setting(config, "sliding_window")
        return None if window is None else int(window)

    def block_kinds(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """All alike: sliding or full."""
        return ("full" if self.window(config) is None else "sliding",) * self.sizes(config).blocks

    def oddities(self, config: Mapping[str, Any]) -> list[Problem]:
        """Mistral has no biases; a window is a positive number or null."""
        found = super().oddities(config)
        for key in ("attention_bias", "mlp_bias"):
            if config.get(key):
                text = f"{key} is set, and Mistral's blocks have no biases"
                found.append(Problem(text, key, "config.json", rule="unsupported-config"))
        window = self.setting(config, "sliding_window")
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            text = f"sliding_window is {window!r}, not a positive number of tokens or null"
            found.append(Problem(text, "sliding_window", "config.json", rule="config-range"))
        return found

    def notes(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """GGUF's llama architecture has no sliding window, and llama.cpp's converter writes none."""
        window, context = self.window(config), self.setting(config, "max_position_embeddings")
        if window is None or window >= context:
            return ()
        return (
            f"this model attends to the last {window} tokens; as GGUF's llama architecture it attends to all of them, "
            f"so beyond a context of {window} tokens the bundle computes something else than the model",
        )
