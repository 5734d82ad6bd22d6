"""What building takes of this machine's memory: predicted before anything runs, and refused where it cannot fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from llmpack.errors import EnvironmentProblem, Problem
from llmpack.models.forward import BATCH_TOKENS
from llmpack.models.graph import ModelGraph
from llmpack.pipeline.recipe import Recipe
from llmpack.pipeline.toml_positions import TomlDocument
from llmpack.steps.host_memory import Batch, Moment
from llmpack.steps.step import Step
from llmpack.units import format_size

LARGEST_PARTS = 4
"""Parts of a moment that an error names."""


@dataclass(frozen=True)
class StepMemory:
    """The moments of one step; none where a step cannot say.

    index  of the step in the recipe
    """

    index: int
    use: str
    moments: tuple[Moment, ...]

    @property
    def largest(self) -> Moment | None:
        """The moment that takes most."""
        return max(self.moments, key=lambda moment: moment.nbytes, default=None)


@dataclass(frozen=True)
class HostMemory:
    """What the steps take that are still to be done.

    limit  of the recipe, None where it sets none
    """

    steps: tuple[StepMemory, ...]
    limit: int | None

    @property
    def largest(self) -> tuple[StepMemory, Moment] | None:
        """The step and the moment that take most; None where nothing is to be done, or nothing is known."""
        found = [(step, step.largest) for step in self.steps]
        known = [(step, moment) for step, moment in found if moment is not None]
        return max(known, key=lambda pair: pair[1].nbytes, default=None)

    @property
    def peak(self) -> int | None:
        """Bytes at that moment."""
        return None if self.largest is None else self.largest[1].nbytes

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "peak": self.peak,
            "limit": self.limit,
            "steps": [
                {
                    "use": step.use,
                    "moments": [
                        {"moment": m.name, "bytes": m.nbytes, "parts": {p.name: p.nbytes for p in m.parts if p.nbytes}}
                        for m in step.moments
                    ],
                }
                for step in self.steps
            ],
        }


def host_memory(
    recipe: Recipe, before: Sequence[ModelGraph], steps: Sequence[Step], to_do: Sequence[bool]
) -> HostMemory:
    """The prediction for the steps that are to do; `before`: the graph that each of them reads."""
    section = recipe.calibration
    batch = None if section is None else Batch.of(section.tokens, section.length)
    found = [
        StepMemory(index, step.use, step.host_memory(graph, batch if step.needs_corpus else None))
        for index, (step, graph, wanted) in enumerate(zip(steps, before, to_do, strict=True))
        if wanted
    ]
    return HostMemory(tuple(found), recipe.build.memory)


def memory_problem(memory: HostMemory, recipe: Recipe, document: TomlDocument) -> Problem | None:
    """What is wrong if a step needs more than the recipe allows."""
    if memory.limit is None or memory.largest is None or memory.largest[1].nbytes <= memory.limit:
        return None
    message = f"{_needs(memory)}; [build] memory = {format_size(memory.limit)} is too little. {_cure(memory, recipe)}"
    return document.problem(("build", "memory"), message)


def require_free_memory(memory: HostMemory, recipe: Recipe) -> None:
    """Raises EnvironmentProblem if this machine has less memory free than a step will need."""
    free = free_memory()
    if memory.largest is not None and memory.largest[1].nbytes > free:
        raise EnvironmentProblem(
            f"{_needs(memory)}; {format_size(free)} are free on this machine. Close other programs, or: "
            f"{_cure(memory, recipe)}"
        )


def _needs(memory: HostMemory) -> str:
    assert memory.largest is not None  # callers have looked
    step, moment = memory.largest
    parts = sorted(moment.parts, key=lambda part: -part.nbytes)[:LARGEST_PARTS]
    listed = ", ".join(f"{part.name} {format_size(part.nbytes)}" for part in parts if part.nbytes)
    return f"step {step.index} {step.use} needs {format_size(moment.nbytes)} while {moment.name} ({listed}, ...)"


def _cure(memory: HostMemory, recipe: Recipe) -> str:
    assert memory.peak is not None
    cures = [f'allow it memory = "{-(-memory.peak // (1 << 20))} MiB"']
    if recipe.calibration is not None and recipe.calibration.length > BATCH_TOKENS:
        cures.append(f"lower calibration.length to {BATCH_TOKENS}")
    if memory.largest is not None and memory.largest[0].use == "quantize.gptq":
        cures.append("use quantize.rtn with importance = false, which needs one matrix at a time")
    return "Either " + ", or ".join(cures)


def free_memory() -> int:
    """Bytes that a process may still take: what the system calls available, or what the container leaves."""
    free = int(psutil.virtual_memory().available)
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    return free if limit is None or used is None else min(free, limit - used)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
