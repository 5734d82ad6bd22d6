"""A GPU for the blocks of the steps, if `[build] processor` asks for one: is it there, does a block fit, is it used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llmpack.errors import EnvironmentProblem, Problem
from llmpack.gpu import torch_with_gpu
from llmpack.pipeline.toml_positions import TomlDocument
from llmpack.steps.host_memory import BASE_PART, RUNNING, Moment
from llmpack.steps.step import Processor, Step
from llmpack.units import format_size

SETTING = "build.processor"


def gpu_class() -> dict[str, str | None]:
    """GPUs of one class give the same bytes. Raises EnvironmentProblem where torch finds none."""
    torch = torch_with_gpu(SETTING)
    return {"name": torch.cuda.get_device_name(0), "cuda": torch.version.cuda}


def gpu_problems(processor: Processor, steps: Sequence[Step], document: TomlDocument) -> Iterator[Problem]:
    """What is wrong with the wish for a GPU: options that exclude it, or that no step would use it."""
    if processor == "cpu":
        return
    if not any(step.walks for step in steps):
        text = 'no step of this recipe runs text through the blocks; leave out processor = "cuda"'
        yield document.problem(("build", "processor"), text)
    for index, step in enumerate(steps):
        if step.walks and step.gpu_problem is not None:
            text = f'{step.gpu_problem}, or leave out processor = "cuda" of [build]'
            yield document.problem(("step", index, "use"), text)


def require_gpu(processor: Processor, moments: Sequence[Moment]) -> None:
    """Raises EnvironmentProblem where a GPU is asked for and there is none, or has too little memory free.

    moments  of the steps that are to be done
    """
    if processor == "cpu":
        return
    free, _ = torch_with_gpu(SETTING).cuda.mem_get_info(0)
    needed = max((_on_gpu(moment) for moment in moments if moment.name == RUNNING), default=0)
    if needed > free:
        raise EnvironmentProblem(
            f"a block and the second moments of its inputs take {format_size(needed)} of the GPU, which has "
            f'{format_size(free)} free; leave out processor = "cuda" of [build]'
        )


def _on_gpu(moment: Moment) -> int:
    return sum(part.nbytes for part in moment.parts if part.name != BASE_PART)
