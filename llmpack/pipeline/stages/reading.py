"""Stage 1, read: TOML to Recipe. Every problem at once; no torch, no model."""

from __future__ import annotations

from dataclasses import replace

from llmpack.pipeline.recipe import read_recipe
from llmpack.pipeline.state import Build


def read(build: Build) -> Build:
    """Fill in `recipe` and `document`. Raises RecipeError."""
    recipe, document = read_recipe(build.order.recipe, build.order.overrides)
    return replace(build, recipe=recipe, document=document)
