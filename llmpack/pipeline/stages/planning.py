"""Stage 3, plan: what the build will make, and whether it can fit. No data is read."""

from __future__ import annotations

from dataclasses import replace

from llmpack.errors import RecipeError
from llmpack.pipeline.plan import make_plan
from llmpack.pipeline.state import Build


def plan(build: Build) -> Build:
    """Fill in `plan`. Raises RecipeError for what cannot work, and for text that is not there."""
    order = build.order
    texts = [text for text in (build.calibration, build.evaluation) if text is not None]
    problems = [problem for text in texts for problem in text.missing()]
    try:
        made = make_plan(build.recipe, build.document, build.origin, build.calibration, order.cache, order.out)
    except RecipeError as error:
        raise RecipeError([*error.problems, *problems]) from error
    if problems:
        raise RecipeError(problems)
    return replace(build, plan=made)
