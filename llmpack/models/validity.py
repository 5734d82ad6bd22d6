"""What numbers of a config.json must be, whatever the family: each check gives its list of problems."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from llmpack.errors import Problem
from llmpack.models.tables import LIMITS, Setting, Sizes


def _range(text: str, key: str) -> Problem:
    return Problem(text, key, "config.json", rule="config-range")


def size_problems(sizes: Mapping[str, Any]) -> list[Problem]:
    """Sizes that are missing, no whole numbers, or beyond `LIMITS`."""
    found = []
    for key, most in LIMITS.items():
        value = sizes[key]
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            text = "is missing" if value is None else f"is {value!r}, not a whole number from 1 to {most}"
            found.append(_range(f"{key} {text}", key))
    return found


def epsilon_problems(eps: Any) -> list[Problem]:
    """What norms add to a variance is small and positive."""
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
        return [_range(f"rms_norm_eps is {eps!r}", "rms_norm_eps")]
    return []


def head_problems(sizes: Sizes, *, own_width: bool, name: str) -> list[Problem]:
    """Heads that cannot be shared or rotated, or whose width llama.cpp does not read for this family."""
    found = []
    if sizes.heads % sizes.kv_heads:
        text = f"{sizes.heads} heads cannot share {sizes.kv_heads} key and value heads evenly"
        found.append(_range(text, "num_key_value_heads"))
    if sizes.head_dim % 2:
        found.append(_range(f"heads of {sizes.head_dim} cannot be rotated in pairs", "head_dim"))
    if not own_width and sizes.q_rows != sizes.hidden:
        text = f"{sizes.heads} heads of {sizes.head_dim} are not the hidden size {sizes.hidden}, as {name} has them"
        found.append(Problem(text, "head_dim", "config.json", rule="unsupported-config"))
    return found


def setting_problems(values: Mapping[Setting, tuple[Any, Any]]) -> list[Problem]:
    """Settings (value and default of each) that are no positive numbers; null is one where it is the default."""
    found = []
    for setting, (value, default) in values.items():
        kinds = int if setting.kind is int else (int, float)
        number = isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < math.inf
        if not number and (value is not None or default is not None):
            kind = "whole number" if setting.kind is int else "number"
            found.append(_range(f"{setting.config} is {value!r}, not a positive {kind}", setting.config))
    return found


def window_problems(window: Any) -> list[Problem]:
    """A sliding window that is neither null nor a positive number of tokens."""
    if window is None or (isinstance(window, int) and not isinstance(window, bool) and window >= 1):
        return []
    return [_range(f"sliding_window is {window!r}, not a positive number of tokens or null", "sliding_window")]


def layer_type_problems(said: Any, blocks: int, known: Collection[str]) -> list[Problem]:
    """``layer_types`` that is no list of one known word a block; silence is fine."""
    if said is None:
        return []
    if not isinstance(said, list) or len(said) != blocks or not all(kind in known for kind in said):
        text = f"layer_types is not a list of {blocks} of: {', '.join(known)}"
        return [_range(text, "layer_types")]
    return []
