"""Rotary position embedding: what a config says about it, in both spellings that configs use.

Older configs write ``rope_theta`` and ``rope_scaling``, transformers 5 writes ``rope_parameters``. Kinds:

    default   theta only
    linear    every frequency divided by a factor (GGUF: two keys)
    llama3    low frequencies divided by a factor, middle ones blended (GGUF: a tensor of divisors)

The other kinds (dynamic, yarn, longrope) are refused: GGUF or llama.cpp would compute something else
than the model does, or nothing here has compared the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmpack.errors import Problem

KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of a model.

    theta             base of the geometric series of frequencies
    factor            by how much positions are stretched (linear, llama3)
    low, high         wavelengths over ``original / low`` are stretched, under ``original / high`` left alone (llama3)
    original          context length before stretching (llama3)
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 1.0
    original: int = 0

    def config(self) -> dict[str, Any]:
        """The keys of config.json, in the older spelling, which every reader of configs knows."""
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


def _positive(table: Mapping[str, Any], key: str, problems: list[Problem]) -> float:
    value = table.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
        problems.append(Problem(f"{key} is {value!r}, not a positive number", "rope_scaling", rule="config-range"))
        return 1.0
    return float(value)


def read_rope(config: Mapping[str, Any], default_theta: float = 10_000.0) -> tuple[Rope, list[Problem]]:
    """The rotary embedding of a config and what is wrong with it; the Rope is usable only without problems."""
    problems: list[Problem] = []
    table = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(table, Mapping):
        return Rope(default_theta), [Problem(f"rope scaling is {table!r}, not a table", rule="config-range")]
    theta = _positive({"rope_theta": config.get("rope_theta", default_theta), **table}, "rope_theta", problems)
    kind = table.get("rope_type", table.get("type", "default"))
    if kind not in KINDS:
        known = ", ".join(KINDS)
        problems.append(Problem(f"rope type {kind!r} is not supported; supported: {known}", rule="unsupported-config"))
        return Rope(theta), problems
    if kind == "default":
        return Rope(theta), problems
    factor = _positive(table, "factor", problems)
    if kind == "linear":
        return Rope(theta, "linear", factor), problems
    low, high = _positive(table, "low_freq_factor", problems), _positive(table, "high_freq_factor", problems)
    original = _positive(table, "original_max_position_embeddings", problems)
    if not problems and high <= low:
        problems.append(
            Problem(
                f"high_freq_factor {high:g} is not above low_freq_factor {low:g}", "rope_scaling", rule="config-range"
            )
        )
    return Rope(theta, "llama3", factor, low, high, int(original)), problems


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
