"""The front matter of a model card: YAML between two lines of ``---`` at the top of README.md."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpack.checkpoint.folder_intake import file_problem
from llmpack.checkpoint.licence import CARD, MAX_CARD
from llmpack.errors import InputRejected, Problem

if TYPE_CHECKING:
    import yaml
else:
    from llmpack.lazy import LazyModule

    yaml = LazyModule("yaml")

_NULLS = ("", "~", "null", "Null", "NULL")


def front_matter(folder: Path) -> dict[str, Any]:
    """The table at the top of a folder's model card; empty without a card or without front matter.

    Every scalar stays the text that was written: a language "no" is no truth value, a version 1.0 no
    number. Entries without a value are left out. Raises InputRejected (rule ``model-card``) for a card
    that is no UTF-8 text or whose front matter is not YAML, and for one that is too large or a link
    out of the folder.
    """
    path = folder / CARD
    if not path.exists():
        return {}
    problem = file_problem(folder, path, MAX_CARD)
    if problem is not None:
        raise InputRejected([problem])
    try:
        lines = path.read_bytes().decode().splitlines()
    except UnicodeDecodeError as fault:
        raise _rejected(path, f"not UTF-8 text ({fault})") from fault
    if not lines or lines[0] != "---":
        return {}
    end = lines.index("---", 1) if "---" in lines[1:] else len(lines)
    text = "\n".join(lines[1:end]).replace("\t", "  ") + "\n"
    try:
        table = yaml.load(text, Loader=yaml.BaseLoader)  # builds nothing but texts, lists and tables
    except (yaml.YAMLError, RecursionError) as fault:
        raise _rejected(path, f"its front matter is not YAML ({fault})") from fault
    if not isinstance(table, dict):
        return {}
    return {str(key): value for key, value in table.items() if not (isinstance(value, str) and value in _NULLS)}


def _rejected(path: Path, message: str) -> InputRejected:
    return InputRejected([Problem(f"{message}; correct the file or delete it", where=str(path), rule="model-card")])
