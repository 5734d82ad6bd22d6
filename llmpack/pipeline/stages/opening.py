"""Stage 2, open: the source, validated by its headers, and the texts of the recipe, not yet read."""

from __future__ import annotations

from dataclasses import replace

from llmpack.pipeline.corpora import Text
from llmpack.pipeline.origin import open_origin
from llmpack.pipeline.state import Build


def open_source(build: Build) -> Build:
    """Fill in `origin`, `calibration` and `evaluation`. Raises RecipeError, EnvironmentProblem or InputRejected."""
    recipe, document, order = build.recipe, build.document, build.order
    origin = open_origin(recipe, document, build.cache, offline=order.offline)

    def text(name: str) -> Text | None:
        section = getattr(recipe, name)
        return None if section is None else Text(name, section, document, origin.checkpoint, order.offline)

    return replace(build, origin=origin, calibration=text("calibration"), evaluation=text("evaluation"))
