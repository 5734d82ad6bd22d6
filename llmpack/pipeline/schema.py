"""The JSON Schema of recipes, for completion and checking in editors (`#:schema recipe.schema.json`).

It is generated from the models that read recipes, so it cannot say anything else. Only what draft 4 and
draft 7 have in common is used, because editors for TOML differ in which of the two they follow.
"""

from __future__ import annotations

import json
from typing import Any

from llmpack.pipeline.recipe import Recipe
from llmpack.steps import STEPS

_DRAFT = "http://json-schema.org/draft-07/schema#"


def recipe_schema() -> dict[str, Any]:
    """The schema of a recipe, steps of other packages included."""
    schema = Recipe.model_json_schema(by_alias=True)
    definitions: dict[str, Any] = schema.pop("$defs", {})
    definitions.pop("Step", None)
    choices = []
    for name, kind in STEPS.items():
        own = kind.model_json_schema(by_alias=True)
        definitions |= own.pop("$defs", {})
        own["properties"] = {**own.get("properties", {}), "use": {"enum": [name], "description": _first(own)}}
        own["required"] = sorted({*own.get("required", []), "use"})
        definitions[name] = {**own, "title": name}
        choices.append({"$ref": f"#/definitions/{name}"})
    schema["properties"]["step"] = {
        "type": "array",
        "description": schema["properties"]["step"].get("description", ""),
        "items": {"oneOf": choices},
    }
    whole = {"$schema": _DRAFT, **schema, "title": "llmpack recipe", "definitions": definitions}
    return {key: _common(value) for key, value in whole.items()}


def schema_text() -> str:
    """The schema as it is checked in."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


def _first(schema: dict[str, Any]) -> str:
    return str(schema.get("description", "")).partition("\n")[0]


def _common(value: Any) -> Any:
    """The same schema in words that drafts 4 and 7 share."""
    if isinstance(value, list):
        return [_common(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if key == "const":
            found["enum"] = [inner]
        elif key == "$ref":
            found[key] = str(inner).replace("#/$defs/", "#/definitions/")
        elif key in ("exclusiveMinimum", "exclusiveMaximum") and not isinstance(inner, dict):
            found[key.replace("exclusiveM", "m")] = inner
        elif key == "discriminator":
            continue
        else:
            found[key] = _common(inner)
    return found
