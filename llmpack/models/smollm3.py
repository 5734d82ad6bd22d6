"""SmolLM3: Llama without rotary embedding in every fourth block.

Hugging Face 2025, https://huggingface.co/blog/smollm3; Yang et al. 2025, arXiv:2501.18795 (the pattern)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from llmpack.errors import Problem
from llmpack.models.family import Family
from llmpack.models.llama import Llama
from llmpack.models.tables import Sizes
from llmpack.models.validity import window_problems


class SmolLM3(Llama):
    """`SmolLM3ForCausalLM`. Rows of q and k are interleaved in blocks without rotary embedding too; scores stay."""

    name = "smollm3"
    architectures = ("SmolLM3ForCausalLM",)
    model_type = "smollm3"
    gguf_arch = "smollm3"

    defaults: ClassVar[Mapping[str, Any]] = {
        **Llama.defaults,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
        "sliding_window": None,
    }

    without = ("attention_bias", "mlp_bias")
    rope_kinds = ("default", "linear")
    layered = True

    every: ClassVar[int] = 4
    """The last of so many blocks is not rotated; so in llama.cpp."""

    def stated_head_dim(self, config: Mapping[str, Any]) -> int | None:
        """Where the config does."""
        return Family.stated_head_dim(self, config)

    def window(self, config: Mapping[str, Any]) -> int | None:
        """Only where it is switched on."""
        window: int | None = self.setting(config, "sliding_window")
        return window if self.setting(config, "use_sliding_window") else None

    def rotated(self, config: Mapping[str, Any], index: int) -> bool:
        """Whether a block has rotary embedding."""
        said = config.get("no_rope_layers")  # 1 where there is one, whatever the name says
        return bool(said[index] if said is not None else (index + 1) % self.setting(config, "no_rope_layer_interval"))

    def _kinds(self, config: Mapping[str, Any], blocks: int) -> tuple[str, ...]:
        kinds = super()._kinds(config, blocks)
        return tuple(kinds[i] if self.rotated(config, i) or kinds[i] != "full" else "unrotated" for i in range(blocks))

    def kind(self, config: Mapping[str, Any], index: int) -> str:
        """Windows, where there are any, are in the blocks without rotary embedding."""
        return "sliding" if self.window(config) is not None and not self.rotated(config, index) else "full"

    def oddities(self, config: Mapping[str, Any], sizes: Sizes) -> list[Problem]:
        """Which blocks are not rotated is built into llama.cpp."""
        found = window_problems(self.window(config))
        said, every = config.get("no_rope_layers"), self.setting(config, "no_rope_layer_interval")
        built_in = [int((index + 1) % self.every != 0) for index in range(sizes.blocks)]
        if (said is None and every != self.every) or (said is not None and said != built_in):
            text = f"not every {self.every}. block is without rotary embedding, as llama.cpp has it built in"
            key = "no_rope_layer_interval" if said is None else "no_rope_layers"
            found.append(Problem(text, key, "config.json", rule="unsupported-config"))
        return found
