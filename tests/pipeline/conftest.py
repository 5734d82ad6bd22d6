"""Recipes and orders for the small model, with a cache of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from small_recipe import RECIPE, SHORT

from llmpack.pipeline.cache import Cache
from llmpack.pipeline.state import Order
from llmpack.progress import QUIET


@pytest.fixture
def recipe_file(packable: Path, tmp_path: Path) -> Path:
    """A recipe for the small model that passes on any machine."""
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE.format(model=packable))
    return path


@pytest.fixture
def order(recipe_file: Path, tmp_path: Path) -> Callable[..., Order]:
    """Orders for that recipe; keyword arguments are fields of `Order`."""

    def make(*overrides: str, **fields: object) -> Order:
        cache = fields.pop("cache", None) or Cache(tmp_path / "cache", progress=fields.get("progress", QUIET))
        fields.setdefault("protocol", SHORT)
        return Order(recipe_file, tmp_path / "out", cache, overrides, **fields)

    return make
