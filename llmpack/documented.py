"""Models whose fields are described by the text below them, read only when somebody asks for it.

pydantic's `use_attribute_docstrings` parses the source of every model as it is defined, which is a good part of the
time of `llmpack plan`.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, GetJsonSchemaHandler
from pydantic_core import CoreSchema


class Documented(BaseModel):
    """A model of which the JSON Schema has the descriptions too."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """pydantic's schema, with the descriptions of fields in it."""
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        texts = descriptions(cls)
        for name, field in cls.model_fields.items():
            shown = properties.get(field.alias or name)
            if shown is not None and name in texts:
                shown.setdefault("description", texts[name])
        return schema


def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """What stands below each field that has such a text, in the model itself and in those that it builds on."""
    found: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        if not issubclass(kind, Documented) or kind is Documented:
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in pairwise(definition.body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and _is_text(text):
                found[field.target.id] = inspect.cleandoc(ast.literal_eval(text.value))  # type: ignore[attr-defined]
    return found


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
