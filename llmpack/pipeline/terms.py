"""Terms: by what a finished file is judged. The tables [budget], [target] and [runtime] of a recipe, and no other.

They come from a bundle's recipe, from a budget file, and from the command line, each going before the one before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmpack.errors import Problem, RecipeError
from llmpack.pipeline.recipe_errors import problems_of
from llmpack.pipeline.sections import Section, TargetSection
from llmpack.pipeline.toml_positions import TomlDocument, read_toml
from llmpack.runtime.settings import RuntimeSettings
from llmpack.target.budget import Budget

SHORT_NAMES = {"ttft": "first_token"}
"""What `--budget` takes beside the names of the limits."""


class Terms(Section):
    """What a budget file holds."""

    runtime: RuntimeSettings = RuntimeSettings()
    """How the model is run; every limit holds under these settings."""
    target: TargetSection = TargetSection()
    """The device that is judged for."""
    budget: Budget = Budget()
    """The limits."""


def read_terms(
    options: Mapping[str, Any], where: str, budgets: Sequence[str], changes: Sequence[str]
) -> tuple[Terms, TomlDocument]:
    """The terms of a check.

    options  tables of the bundle's recipe; those that a budget file has are replaced whole
    where    name of what they are from, for messages
    budgets  budget files, and limits such as ``memory=350 MiB``
    changes  ``path=value``, where a path begins with the name of a table

    Raises RecipeError with every problem of the files, else of the limits and changes.
    """
    document = TomlDocument(where, {name: options[name] for name in Terms.model_fields if name in options})
    assignments = []
    for word in budgets:
        if "=" in word:
            name, _, value = word.partition("=")
            assignments.append(f"budget.{SHORT_NAMES.get(name.strip(), name.strip())}={value}")
        else:
            read = read_toml(Path(word))
            _validated(read)
            document = replace(read, values={**document.values, **read.values})
    document = document.with_overrides((*assignments, *changes))
    return _validated(document), document


def _validated(document: TomlDocument) -> Terms:
    try:
        return Terms.model_validate_json(json.dumps(document.values))
    except ValidationError as error:
        raise RecipeError(problems_of(error, document, Terms)) from error


def placed(problem: Problem, document: TomlDocument) -> Problem:
    """A problem that names an option, with the place of that option."""
    return document.problem(tuple(problem.path.split(".")), problem.message, rule=problem.rule)
