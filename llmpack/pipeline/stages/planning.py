"""Stage 3, plan: what the build will make, and whether it can fit. No data is read."""

from __future__ import annotations

from dataclasses import replace

from llmpack.pipeline.plan import make_plan
from llmpack.pipeline.state import Build


def plan(build: Build) -> Build:
    """Fill in `plan`. Raises RecipeError for what cannot work."""
    order = build.order
    made = make_plan(build.recipe, build.document, build.origin, build.calibration, order.cache, order.out)
    return replace(build, plan=made)
