"""What pydantic found wrong, in the words and at the place where the author of a recipe needs it."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from llmpack.documented import Documented, descriptions
from llmpack.errors import Problem
from llmpack.pipeline.toml_positions import Key, TomlDocument
from llmpack.registry import suggestion

_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "an array",
    dict: "a table",
}
_EXPECTED = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text in quotes",
    "tuple_type": "an array",
    "list_type": "an array",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
}


def problems_of(
    error: ValidationError, document: TomlDocument, model: type[BaseModel], base: Key = ()
) -> list[Problem]:
    """One problem for each place, in the order of the file's sections.

    base  path of the table that `model` describes
    """
    found: dict[Key, Problem] = {}
    for detail in error.errors(include_url=False):
        key = (*base, *_real(detail["loc"], document.values, base))
        unknown = detail["type"] == "extra_forbidden"
        message = _message(detail, model)
        found.setdefault(key, document.problem(key, message, of_key=unknown))
    return list(found.values())


def _real(loc: Key, values: Any, base: Key) -> Key:
    """The part of a pydantic location that exists in the file: tags of unions are not keys.

    A missing key is the last part of its location and is kept.
    """
    here = values
    for part in base:
        here = here[part]
    real: list[str | int] = []
    for position, part in enumerate(loc):
        if isinstance(here, dict) and part in here:
            here = here[str(part)]
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            here = here[part]
        elif not (isinstance(here, dict) and position == len(loc) - 1):
            continue
        real.append(part)
    return tuple(real)


def _message(detail: ErrorDetails, model: type[BaseModel]) -> str:
    kind, given = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        name = str(detail["loc"][-1])
        return f"unknown key `{name}`{suggestion(name, fields_at(model, detail['loc'][:-1]))}"
    if kind == "missing":
        return "is missing" + _description(model, detail["loc"])
    if kind == "literal_error":
        known = [
            text.strip("'") for text in str(detail.get("ctx", {}).get("expected", "")).replace(" or ", ", ").split(", ")
        ]
        return f"{_shown(given)} is not known here{suggestion(str(given), known)}"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, got {_shown(given)}"
    text = detail["msg"].removeprefix("Value error, ")
    return (
        text if _shown(given) in text or repr(given) in text else f"{text[:1].lower()}{text[1:]}, got {_shown(given)}"
    )


def _shown(value: Any) -> str:
    for kind, word in _KINDS.items():
        if type(value) is kind and kind in (list, dict):
            return word
    text = f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _description(model: type[BaseModel], loc: Key) -> str:
    owner = model_at(model, loc[:-1])
    known = descriptions(owner) if owner and issubclass(owner, Documented) else {}
    text = " ".join(known.get(str(loc[-1]), "").split())
    return f"; {text}" if text else ""


def fields_at(model: type[BaseModel], loc: Key) -> list[str]:
    """Names that a table at that location may have, as files spell them."""
    owner = model_at(model, loc)
    return [field.alias or name for name, field in owner.model_fields.items()] if owner else []


def model_at(model: type[BaseModel], loc: Key) -> type[BaseModel] | None:
    """The model that describes the table at a location; parts that name no field (indices, tags) are passed over."""
    here: type[BaseModel] | None = model
    for part in loc:
        if here is None:
            return None
        field = here.model_fields.get(str(part))
        if field is not None:
            here = _model_in(field.annotation)
    return here


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Annotated, Union, types.UnionType, tuple, list, Mapping, dict):
        for inner in get_args(annotation):
            found = _model_in(inner)
            if found is not None:
                return found
    return None
