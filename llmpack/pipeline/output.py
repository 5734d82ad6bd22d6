"""What `[bundle]` asks for: the format of the model, its layout, and what goes with neither."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator

from llmpack.errors import Problem, RecipeError
from llmpack.formats.gguf import GgufFormat
from llmpack.formats.layouts import LAYOUTS, Layout
from llmpack.formats.safetensors_folder import SHARD_BYTES, SafetensorsFormat
from llmpack.models.graph import ModelGraph
from llmpack.registry import suggestion
from llmpack.runtime.settings import foreign_to_llama, foreign_to_transformers
from llmpack.target.outline import Outline
from llmpack.target.transformers_memory import loader_of

if TYPE_CHECKING:
    from llmpack.pipeline.recipe import BundleSection, Recipe
    from llmpack.pipeline.toml_positions import Key, TomlDocument

ModelFormat = GgufFormat | SafetensorsFormat

LAYOUT_OPTIONS = ("double_quant", "keep")
"""Keys of `[bundle]` that only some layouts have; a layout that has one has a field of that name."""


def _known_layout(name: str) -> str:
    if name not in LAYOUTS:
        raise ValueError(f"unknown layout `{name}`{suggestion(name, list(LAYOUTS))}")
    return name


LayoutName = Annotated[str, AfterValidator(_known_layout)]
"""Name of a layout of safetensors folders."""


def file_format(section: BundleSection) -> ModelFormat:
    """The format of a recipe without contradictions."""
    if section.format == "gguf":
        return GgufFormat(section.float)
    return SafetensorsFormat(_layout(section), section.shard or SHARD_BYTES)


def _layout(section: BundleSection) -> Layout:
    options = {name: getattr(section, name) for name in LAYOUT_OPTIONS if getattr(section, name) is not None}
    return LAYOUTS.load(section.layout or "plain")(floats=section.float, **options)


def output_problems(recipe: Recipe, document: TomlDocument) -> list[Problem]:
    """Options of a recipe that do not go with its format or its layout."""
    section = recipe.bundle
    found: list[tuple[Key, str]] = []
    if section.format == "gguf":
        for name in ("layout", "shard", *LAYOUT_OPTIONS):
            if getattr(section, name) is not None:
                found.append((("bundle", name), f'{name} belongs to format = "safetensors"; set it, or leave this out'))
        found += [(("runtime", problem.path), problem.message) for problem in foreign_to_llama(recipe.runtime)]
        return [document.problem(key, text) for key, text in found]
    kind = LAYOUTS.load(section.layout or "plain")
    has = {field.name for field in fields(kind)}
    for name in LAYOUT_OPTIONS:
        if getattr(section, name) is not None and name not in has:
            found.append((("bundle", name), f'layout = "{kind.name}" has no option {name}; leave it out'))
    found += [(("runtime", problem.path), problem.message) for problem in foreign_to_transformers(recipe.runtime)]
    for index, step in enumerate(recipe.step):
        if step.use in ("quantize.auto", "quantize.llamacpp"):
            text = f'{step.use} chooses among the encodings of GGUF; set format = "gguf", or use another step'
            found.append((("step", index, "use"), text))
    return [document.problem(key, text) for key, text in found]


def require_layout(form: ModelFormat, graph: ModelGraph, document: TomlDocument) -> None:
    """Raises RecipeError for options that mean nothing in this model, MissingExtra for what the bundle needs."""
    if isinstance(form, SafetensorsFormat):
        problems = form.layout.option_problems(graph)
        if problems:
            raise RecipeError([document.problem(("bundle", problem.path), problem.message) for problem in problems])
        form.layout.require()
        form.layout.require_loader()


def outline_of(form: ModelFormat, graph: ModelGraph) -> Outline:
    """What memory and speed of the model on a device follow from, as far as that is known."""
    outline = Outline.of_graph(graph)
    if isinstance(form, SafetensorsFormat):
        nbytes = sum(size for _, size in form.totals(graph).values())
        return outline.in_transformers(loader_of(form.config(graph), nbytes))
    return outline
