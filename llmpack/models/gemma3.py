"""Gemma 3, text only (270M, 1B): Gemma 2 with norms on q and k in place of the cap on scores, and two rotary bases.

Gemma team 2025, arXiv:2503.19786
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from llmpack.errors import Problem
from llmpack.models.gemma2 import Gemma2
from llmpack.models.rope import Rope, read_rope
from llmpack.models.tables import Row, Setting, Sizes


class Gemma3(Gemma2):
    """`Gemma3ForCausalLM`: five blocks with a window and a small rotary base, then one that sees everything.

    A difference to llama.cpp's converter: where ``layer_types`` says that every block sees everything, no window is
    written, so that llama.cpp has none either.
    """

    name = "gemma3"
    architectures = ("Gemma3ForCausalLM",)
    model_type = "gemma3_text"
    gguf_arch = "gemma3"

    outside = (*Gemma2.outside, Row("lm_head.weight", "output", ("vocab", "hidden"), "output.weight", when="untied"))
    block = (
        *Gemma2.block[:4],
        Row("self_attn.q_norm.weight", "norm", ("head_dim",), "attn_q_norm.weight"),
        Row("self_attn.k_norm.weight", "norm", ("head_dim",), "attn_k_norm.weight"),
        *Gemma2.block[4:],
    )
    defaults: ClassVar[Mapping[str, Any]] = {
        **Gemma2.defaults,
        "max_position_embeddings": 131_072,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }

    without = (*Gemma2.without, "attn_logit_softcapping")
    rope_kinds = ("default", "linear")
    settings = (
        Setting("rope.freq_base_swa", "rope_local_base_freq"),
        Setting("final_logit_softcapping", "final_logit_softcapping"),
        Setting("attention.sliding_window", "sliding_window", int),
    )

    every = 6
    scaled_by_width = 62
    states_rope = True

    def _nested(self, config: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
        """The rotary embedding of one kind of block in transformers 5's spelling, None in the older one."""
        table = config.get("rope_parameters")
        if not isinstance(table, Mapping) or not {"full_attention", "sliding_attention"} & table.keys():
            return None
        entry = table.get(kind)
        return entry if isinstance(entry, Mapping) else {}

    def setting(self, config: Mapping[str, Any], key: str) -> Any:
        """The base of blocks with a window is spelled in two ways."""
        nested = self._nested(config, "sliding_attention") if key == "rope_local_base_freq" else None
        return nested["rope_theta"] if nested and "rope_theta" in nested else super().setting(config, key)

    def read_rope(self, config: Mapping[str, Any]) -> tuple[Rope, list[Problem]]:
        """The rotary embedding of blocks that see everything; that of the others is one number."""
        nested = self._nested(config, "full_attention")
        if nested is None:
            return super().read_rope(config)
        local = read_rope({"rope_parameters": self._nested(config, "sliding_attention")}, kinds=("default",))[1]
        rope, problems = read_rope({"rope_parameters": nested}, self.defaults["rope_theta"], self.rope_kinds)
        return rope, problems + local

    def kind(self, config: Mapping[str, Any], index: int) -> str:
        """The number of blocks after which one sees everything was once a setting."""
        every = config.get("sliding_window_pattern", self.every)
        return "sliding" if (index + 1) % every else "full"

    def oddities(self, config: Mapping[str, Any], sizes: Sizes) -> list[Problem]:
        """As in Gemma 2; the old setting is a positive number."""
        every = config.get("sliding_window_pattern", self.every)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            text = f"sliding_window_pattern is {every!r}, not a positive number of blocks"
            return [Problem(text, "sliding_window_pattern", "config.json", rule="config-range")]
        return super().oddities(config, sizes)

    def runs_pattern(self, kinds: tuple[str, ...]) -> bool:
        """llama.cpp also runs the model without any window."""
        return "sliding" not in kinds or super().runs_pattern(kinds)

    def hyperparameters(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The common keys and the settings; no window where no block has one."""
        keys = super().hyperparameters(config)
        if "sliding" not in self.block_kinds(config):
            del keys[f"{self.gguf_arch}.attention.sliding_window"]
        return keys
