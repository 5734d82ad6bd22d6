"""The first stages of a build alone: what `llmpack plan` shows. Nothing here needs torch or a runtime."""

from __future__ import annotations

from collections.abc import Callable

from llmpack.pipeline.stages.opening import open_source
from llmpack.pipeline.stages.planning import plan
from llmpack.pipeline.stages.reading import read
from llmpack.pipeline.state import Build, Order

Stage = Callable[[Build], Build]

PLANNING: tuple[Stage, ...] = (read, open_source, plan)


def plan_bundle(order: Order) -> Build:
    """What a build would do and make. Raises RecipeError, EnvironmentProblem or InputRejected."""
    build = Build(order)
    for stage in PLANNING:
        build = stage(build)
    return build
