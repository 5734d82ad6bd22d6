"""RuntimeSettings: how the bundle is meant to be run. They ship in it, and every verdict holds under them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Self

import psutil
from pydantic import ConfigDict, Field, model_validator

from llmpack.documented import Documented
from llmpack.errors import Problem


class RuntimeSettings(Documented):
    """The ``[runtime]`` table of a recipe, in llama.cpp's terms."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kv: Literal["f16", "q8_0", "q4_0"] = "f16"
    """Type of the KV cache, keys and values alike."""

    threads: int | None = Field(default=None, ge=1, le=1024)
    """Compute threads; by default one for each physical core that may be used."""

    batch: int = Field(default=512, ge=1, le=1 << 16)
    """Most tokens of a prompt handed over at once."""

    ubatch: int = Field(default=512, ge=1, le=1 << 16)
    """Most tokens computed at once; scratch memory grows with it."""

    flash_attention: Literal["auto", "on", "off"] = "auto"
    """Attention without the matrix of all scores; a quantized cache needs it."""

    load: Literal["auto", "mmap", "no-mmap"] = "auto"
    """Map the file or read it into memory. Weights repacked for the processor stand in memory twice if mapped."""

    processor: Literal["cpu", "cuda"] = "cpu"
    """What computes. cuda: the first GPU that torch finds by CUDA, for safetensors folders alone; what is taken of its
    memory counts in addition to that of the process."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.ubatch > self.batch:
            raise ValueError(f"ubatch ({self.ubatch}) is larger than batch ({self.batch}); raise batch or lower ubatch")
        if self.kv != "f16" and self.flash_attention == "off":
            raise ValueError(f'kv = "{self.kv}" needs flash attention; set flash_attention = "auto" or kv = "f16"')
        return self

    @property
    def effective_threads(self) -> int:
        """Threads as given, else the physical cores that this process may use."""
        return self.threads if self.threads is not None else usable_cores()


LLAMA_ALONE = ("kv", "flash_attention", "load")
"""Settings that mean nothing to transformers; `ubatch` neither, which computes `batch` tokens at once."""


def foreign_to_transformers(settings: RuntimeSettings) -> list[Problem]:
    """Settings that transformers, which runs safetensors bundles, does not have; `path` names the key."""
    usual = RuntimeSettings()
    text = "is a setting of llama.cpp; a safetensors folder runs in transformers, leave it out"
    changed = [name for name in LLAMA_ALONE if getattr(settings, name) != getattr(usual, name)]
    return [Problem(f"{name} {text}", name) for name in changed]


def foreign_to_llama(settings: RuntimeSettings) -> list[Problem]:
    """Settings that llama.cpp, which runs GGUF files, is not asked for; `path` names the key."""
    if settings.processor == "cpu":
        return []
    text = f'processor = "{settings.processor}" is for safetensors folders; llama.cpp computes on the CPU, leave it out'
    return [Problem(text, "processor")]


def usable_cores() -> int:
    """Physical cores, or the processors that this process is confined to where those are fewer."""
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return max(1, min(physical, allowed))


def pinned_cpus(count: int) -> tuple[int, ...]:
    """Numbers of processors to run so many threads on: one of each physical core first, as far as the system tells.

    Empty where processors cannot be chosen.
    """
    if not hasattr(os, "sched_getaffinity"):
        return ()
    allowed = sorted(os.sched_getaffinity(0))
    cores: dict[tuple[str, str], int] = {}
    for cpu in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            package, core = ((topology / name).read_text().strip() for name in ("physical_package_id", "core_id"))
        except OSError:
            package, core = "", str(cpu)
        cores.setdefault((package, core), cpu)
    first = list(cores.values())
    return tuple((first + [cpu for cpu in allowed if cpu not in first])[:count])
