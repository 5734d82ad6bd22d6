"""The recipe: a TOML file as frozen, validated objects. DESIGN section 4 is its description.

Reading reports every problem at once, each with ``file:line:col``, its TOML path and, where a name is
nearly right, the name that was meant.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, ValidationError

from llmpack.errors import Problem, RecipeError
from llmpack.pipeline.gpu import gpu_problems
from llmpack.pipeline.output import LayoutName, output_problems
from llmpack.pipeline.recipe_errors import problems_of
from llmpack.pipeline.sections import Section, TargetSection, Text
from llmpack.pipeline.toml_positions import TomlDocument, read_toml
from llmpack.registry import suggestion
from llmpack.runtime.settings import RuntimeSettings
from llmpack.steps import STEPS
from llmpack.steps.step import Processor, Step
from llmpack.target.budget import Budget
from llmpack.target.quantities import Size

FloatName = Literal["f32", "f16", "bf16"]


class SourceSection(Section):
    """`[source]`: the checkpoint to start from."""

    model: Text
    """A folder, `gguf:FILE` or a path ending in `.gguf`, `package:NAME/FILE`, or `hf:org/name@commit`.
    Relative paths start at the recipe's folder."""
    dequantize: bool = False
    """True if the source may be quantized already; the manifest and the card then say so."""
    dtype: FloatName | None = None
    """Float type into which a GGUF source is decoded (default f32, which loses nothing). Folders keep theirs."""


class CalibrationSection(Section):
    """`[calibration]`: the text that steps learn from."""

    text: tuple[Text, ...] = Field(min_length=1)
    """`python:MODULE`, files, folders, `FILE.jsonl#FIELD`, or `dataset:OWNER/NAME@COMMIT/SPLIT#FIELD` of the hub;
    relative paths start at the recipe's folder."""
    tokens: int = Field(default=32_768, ge=1, le=2**31)
    """How many tokens, a multiple of `length` from below."""
    length: int = Field(default=512, ge=2, le=2**20)
    """Tokens of one sequence."""
    seed: int = Field(default=0, ge=0, le=2**31)
    """Which windows of the text are taken."""


class EvaluationSection(Section):
    """`[evaluation]`: the text that judges quality; none of it may be in the calibration text."""

    text: tuple[Text, ...] = Field(min_length=1)
    """As in `[calibration]`."""
    tokens: int = Field(default=4096, ge=2, le=2**24)
    """How many tokens are compared with the source model."""
    length: int = Field(default=512, ge=2, le=2**20)
    """Tokens of one sequence."""
    seed: int = Field(default=0, ge=0, le=2**31)
    """Which windows of the text are taken."""


class BundleSection(Section):
    """`[bundle]`: what is written."""

    format: Literal["gguf", "safetensors"] = "gguf"
    """`gguf`: one file for llama.cpp; `safetensors`: a model folder for transformers and what builds on it."""
    float: FloatName = "f16"
    """Type of what no step quantized (in a GGUF file of the matrices alone, vectors are always f32)."""
    layout: LayoutName | None = None
    """How a safetensors folder holds the weights (default `plain`): `llmpack list layouts` shows the others."""
    double_quant: bool | None = None
    """Whether a `bnb-` layout stores its scales in 8 bits too (default true)."""
    keep: tuple[Text, ...] | None = None
    """Parts that a `bnb-` layout leaves as floats, such as `"attention.v"`, or `"ffn.down@0-3,29"` in some blocks."""
    shard: Size | None = None
    """Most bytes of one safetensors file; a larger model gets several and an index. Default: 5 GB."""


class BuildSection(Section):
    """`[build]`: the machine that builds."""

    memory: Size | None = None
    """Most resident memory of the steps. A plan that needs more is refused, and the steps are held to it (Linux).
    Default: what the machine has free."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """Threads of the steps; part of what makes builds equal byte for byte. Default: the cores of this machine."""
    processor: Processor = "cpu"
    """What runs the blocks of the steps that read text block by block, and sums their inputs; rounding is done on the
    processor. cuda: the first GPU that torch finds, which then is part of what makes builds equal byte for byte."""


class Recipe(Section):
    """A whole recipe."""

    version: Literal[1] = Field(alias="schema")
    """Version of this file's layout."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Name of the bundle and of its folder."""
    source: SourceSection
    calibration: CalibrationSection | None = None
    step: tuple[SerializeAsAny[Step], ...] = ()
    """The changes, in order; `llmpack list steps` shows them."""
    bundle: BundleSection = BundleSection()
    evaluation: EvaluationSection | None = None
    runtime: RuntimeSettings = RuntimeSettings()
    target: TargetSection = TargetSection()
    budget: Budget = Budget()
    build: BuildSection = BuildSection()

    def options(self) -> dict[str, Any]:
        """Everything with defaults filled in, as JSON values: what the lock and the manifest record."""
        return self.model_dump(mode="json", by_alias=True)


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, TomlDocument]:
    """The recipe of a file with ``path=value`` overrides applied. Raises RecipeError with all problems."""
    document = read_toml(path).with_overrides(overrides)
    return validate(document), document


def validate(document: TomlDocument) -> Recipe:
    """The recipe of a document. Raises RecipeError with all problems."""
    tables = document.values.get("step", [])
    steps, problems = _steps(document, tables)
    body = {key: value for key, value in document.values.items() if key != "step"}
    recipe = None
    try:
        recipe = Recipe.model_validate_json(json.dumps(body))
    except ValidationError as error:
        problems += problems_of(error, document, Recipe)
    if recipe is not None:
        recipe = recipe.model_copy(update={"step": tuple(steps)})
        problems += _contradictions(recipe, document)
    if problems or recipe is None:
        raise RecipeError(problems)
    return recipe


def _steps(document: TomlDocument, tables: Any) -> tuple[list[Step], list[Problem]]:
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        return [], [document.problem(("step",), "steps are an array of tables; write [[step]]")]
    steps: list[Step] = []
    problems: list[Problem] = []
    for index, table in enumerate(tables):
        use = table.get("use")
        if not isinstance(use, str):
            message = "every step says what it does: use = one of " + ", ".join(STEPS)
            problems.append(document.problem(("step", index, "use"), message))
        elif use not in STEPS:
            message = f"unknown step `{use}`{suggestion(use, list(STEPS))}"
            problems.append(document.problem(("step", index, "use"), message))
        else:
            kind: type[Step] = STEPS.load(use)
            try:
                steps.append(kind.model_validate_json(json.dumps(table)))
            except ValidationError as error:
                problems += problems_of(error, document, kind, ("step", index))
    return steps, problems


def _contradictions(recipe: Recipe, document: TomlDocument) -> list[Problem]:
    """Sections that are each right and do not fit together."""
    problems = [*output_problems(recipe, document), *gpu_problems(recipe.build.processor, recipe.step, document)]
    for index, step in enumerate(recipe.step):
        if step.needs_corpus and recipe.calibration is None:
            message = f"{step.use} needs text to learn from; add a [calibration] section"
            problems.append(document.problem(("step", index, "use"), message))
    for key, section in (("calibration", recipe.calibration), ("evaluation", recipe.evaluation)):
        if section is not None and section.tokens < section.length:
            message = f"{section.tokens} tokens are less than one sequence of {section.length}"
            problems.append(document.problem((key, "tokens"), message))
    if recipe.budget.quality is not None and recipe.evaluation is None:
        message = "quality is judged on text; add an [evaluation] section that names some"
        problems.append(document.problem(("budget", "quality"), message))
    if recipe.calibration and recipe.evaluation:
        shared = sorted(set(recipe.calibration.text) & set(recipe.evaluation.text))
        if shared:
            message = f"{', '.join(shared)} is calibration text too; quality is judged on text that no step has seen"
            problems.append(document.problem(("evaluation", "text"), message))
    return problems
