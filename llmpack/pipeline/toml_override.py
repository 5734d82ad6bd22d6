"""``--set path=value``: a change of the recipe from the command line, before it is validated."""

from __future__ import annotations

import copy
import re
import tomllib
from typing import TYPE_CHECKING, Any

from llmpack.errors import Problem, RecipeError

if TYPE_CHECKING:
    from llmpack.pipeline.toml_positions import Key


def override(values: dict[str, Any], assignment: str) -> tuple[dict[str, Any], Key]:
    """A copy of `values` with one assignment applied, and the path that it set.

    The path is a TOML key; a number picks an element of an array (``step.0.encoding=q4_0``). Tables
    on the way are made; elements of arrays are not. Raises RecipeError.
    """
    left, sign, right = assignment.partition("=")
    if not sign:
        raise RecipeError([Problem("has no `=`; write it like budget.memory=350MiB", where=f"--set {assignment}")])
    names = _path(left.strip(), assignment)
    changed = copy.deepcopy(values)
    here: Any = changed
    key: Key = ()
    for name in names[:-1]:
        key, here = _enter(here, key, name, assignment)
    last = names[-1]
    if isinstance(here, list):
        index = _index(here, key, last, assignment)
        here[index] = _value(right.strip())
        return changed, (*key, index)
    if not isinstance(here, dict):
        raise RecipeError([Problem(f"{_text(key)} is no table", where=f"--set {assignment}")])
    here[last] = _value(right.strip())
    return changed, (*key, last)


def key_of(text: str) -> tuple[str, ...]:
    """The parts of a TOML key: ``exceptions."ffn.down"`` has two. Raises ValueError for anything else."""
    if "\n" in text or len(text) > 200:
        raise ValueError("a key is one line")
    names: list[str] = []
    here: Any = tomllib.loads(f"{text} = 0")
    while isinstance(here, dict):
        name, here = next(iter(here.items()))
        names.append(name)
    return tuple(names)


def _path(text: str, assignment: str) -> tuple[str, ...]:
    try:
        return key_of(text)
    except ValueError as error:
        message = f"`{text}` is not a path; write it like budget.memory or step.0.encoding"
        raise RecipeError([Problem(message, where=f"--set {assignment}")]) from error


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _enter(here: Any, key: Key, name: str, assignment: str) -> tuple[Key, Any]:
    if isinstance(here, list):
        index = _index(here, key, name, assignment)
        return (*key, index), here[index]
    if not isinstance(here, dict):
        raise RecipeError([Problem(f"{_text(key)} is no table", where=f"--set {assignment}")])
    return (*key, name), here.setdefault(name, {})


def _index(here: list[Any], key: Key, name: str, assignment: str) -> int:
    if re.fullmatch(r"[0-9]{1,6}", name) and int(name) < len(here):
        return int(name)
    message = f"{_text(key)} has {len(here)} elements, counted from 0; there is no element `{name}`"
    raise RecipeError([Problem(message, where=f"--set {assignment}")])


def _text(key: Key) -> str:
    return ".".join(str(part) for part in key) or "the recipe"
