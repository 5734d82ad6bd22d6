"""Rotary position embedding: what a config says about it, in both spellings that configs use.

Older configs write ``rope_theta`` and ``rope_scaling``, transformers 5 writes ``rope_parameters``. Kinds:

    default    theta only
    linear     every frequency divided by a factor (GGUF: two keys)
    llama3     low frequencies divided by a factor, middle ones blended (GGUF: a tensor of divisors)
    longrope   every frequency divided by a number of its own, one list for short contexts and one for long, and
               rotated vectors made longer (GGUF: two tensors of divisors and a key)

A family says which of them llama.cpp knows for it. The others (dynamic, yarn) are refused: GGUF or llama.cpp would
compute something else than the model does, or nothing here has compared the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmpack.errors import Problem

if TYPE_CHECKING:
    import numpy as np
else:
    from llmpack.lazy import LazyModule

    np = LazyModule("numpy")

KINDS = ("default", "linear", "llama3", "longrope")


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of a model.

    theta             base of the geometric series of frequencies
    factor            by how much positions are stretched (linear, llama3)
    low, high         wavelengths over ``original / low`` are stretched, under ``original / high`` left alone (llama3)
    original          context length before stretching (llama3, longrope)
    short, long       divisors of the frequencies in contexts up to `original` and beyond (longrope)
    length            by what rotated vectors are multiplied (longrope)
    fraction          part of a head that is rotated, its first features
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 1.0
    original: int = 0
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    length: float = 1.0
    fraction: float = 1.0

    def rotated(self, head_dim: int) -> int:
        """Features of a head that are rotated."""
        return int(self.fraction * head_dim)

    def config(self) -> dict[str, Any]:
        """The keys of config.json, in the older spelling, which every reader of configs knows (not for longrope)."""
        scaling: dict[str, Any] | None = None
        if self.kind == "linear":
            scaling = {"rope_type": "linear", "factor": self.factor}
        elif self.kind == "llama3":
            scaling = {
                "rope_type": "llama3",
                "factor": self.factor,
                "low_freq_factor": self.low,
                "high_freq_factor": self.high,
                "original_max_position_embeddings": self.original,
            }
        return {"rope_theta": self.theta, "rope_scaling": scaling}

    def divisors(self, head_dim: int) -> np.ndarray | None:
        """[head_dim / 2] float32: by what llama.cpp divides each frequency (``rope_freqs.weight``), or None.

        Frequencies are float32 powers rounded once from float64, so the result is the same on every
        machine. Llama 3.1, "rope scaling" (huggingface.co/meta-llama/Llama-3.1-8B, config.json).
        """
        if self.kind != "llama3":
            return None
        f32 = np.float32
        exponents = (np.arange(0, head_dim, 2, dtype=f32) / f32(head_dim)).astype(np.float64)
        frequencies = f32(1) / np.power(float(self.theta), exponents).astype(f32)
        wavelengths = f32(2 * math.pi) / frequencies
        smooth = (f32(self.original) / wavelengths - f32(self.low)) / f32(self.high - self.low)
        blended = f32(1) / ((f32(1) - smooth) / f32(self.factor) + smooth)
        long, short = wavelengths > f32(self.original / self.low), wavelengths < f32(self.original / self.high)
        return np.where(short, f32(1), np.where(long, f32(self.factor), blended)).astype(f32)

    def tensors(self, head_dim: int) -> dict[str, np.ndarray]:
        """The divisors as tensors of a GGUF file, float32."""
        if self.kind == "longrope":
            both = {"long": self.long, "short": self.short}
            return {f"rope_factors_{name}.weight": np.array(values, np.float32) for name, values in both.items()}
        divisors = self.divisors(head_dim)
        return {} if divisors is None else {"rope_freqs.weight": divisors}


def _positive(table: Mapping[str, Any], key: str, problems: list[Problem]) -> float:
    value = table.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
        problems.append(Problem(f"{key} is {value!r}, not a positive number", "rope_scaling", rule="config-range"))
        return 1.0
    return float(value)


def read_rope(
    config: Mapping[str, Any],
    default_theta: float = 10_000.0,
    kinds: tuple[str, ...] = KINDS,
    *,
    partial: bool = False,
) -> tuple[Rope, list[Problem]]:
    """The rotary embedding of a config and what is wrong with it; the Rope is usable only without problems.

    kinds    those that are supported
    partial  whether a part of each head may be rotated
    """
    problems: list[Problem] = []
    table = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(table, Mapping):
        return Rope(default_theta), [Problem(f"rope scaling is {table!r}, not a table", rule="config-range")]
    theta = _positive({"rope_theta": config.get("rope_theta", default_theta), **table}, "rope_theta", problems)
    said = table.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    fraction = 1.0 if said is None else said
    if not isinstance(fraction, int | float) or not 0 < fraction <= 1 or (fraction != 1 and not partial):
        text = f"partial_rotary_factor {fraction!r} is not supported here"
        problems.append(Problem(text, "partial_rotary_factor", "config.json", rule="unsupported-config"))
        fraction = 1.0
    kind = table.get("rope_type", table.get("type", "default"))
    if kind not in kinds:
        known = ", ".join(kinds)
        problems.append(Problem(f"rope type {kind!r} is not supported; supported: {known}", rule="unsupported-config"))
        return Rope(theta), problems
    readers = {"linear": _linear, "llama3": _llama3, "longrope": _longrope}
    scaling = readers[kind](table, config, problems) if kind in readers else {}
    return Rope(theta, kind, fraction=float(fraction), **scaling), problems


def _linear(table: Mapping[str, Any], config: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    return {"factor": _positive(table, "factor", problems)}


def _llama3(table: Mapping[str, Any], config: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    before = len(problems)
    factor = _positive(table, "factor", problems)
    low, high = _positive(table, "low_freq_factor", problems), _positive(table, "high_freq_factor", problems)
    original = _positive(table, "original_max_position_embeddings", problems)
    if len(problems) == before and high <= low:
        text = f"high_freq_factor {high:g} is not above low_freq_factor {low:g}"
        problems.append(Problem(text, "rope_scaling", rule="config-range"))
    return {"factor": factor, "low": low, "high": high, "original": int(original)}


def _longrope(table: Mapping[str, Any], config: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """Ding et al. 2024, arXiv:2402.13753; how much longer rotated vectors get is section 3.3 there."""
    whole = {**config, **table}
    lists = {}
    for name in ("short", "long"):
        values = table.get(f"{name}_factor")
        entries = values if isinstance(values, list) and values else [None]
        lists[name] = tuple(_positive({f"{name}_factor": entry}, f"{name}_factor", problems) for entry in entries)
    original = int(_positive(whole, "original_max_position_embeddings", problems))
    longest = _positive(config, "max_position_embeddings", problems)
    factor = longest / max(original, 1) if table.get("factor") is None else _positive(table, "factor", problems)
    if table.get("attention_factor") is not None:
        length = _positive(table, "attention_factor", problems)
    else:
        length = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    return {**lists, "original": original, "length": length}


def rope_of_divisors(theta: float, head_dim: int, divisors: np.ndarray) -> Rope | None:
    """The llama3 scaling that gives exactly these divisors, or None.

    Its four numbers are not in a GGUF file; they are recovered from the largest divisor and the
    few settings in use (Llama 3.1 to 3.3: low 1, high 4, original 8192).
    """
    factor = float(divisors.max(initial=1.0))
    for original in (8192, 4096, 2048, 16384, 32768):
        rope = Rope(theta, "llama3", factor, 1.0, 4.0, original)
        expected = rope.divisors(head_dim)
        if (
            expected is not None
            and expected.shape == divisors.shape
            and np.allclose(expected, divisors, rtol=1e-6, atol=0)
        ):
            return rope
    return None
