"""The texts that a recipe names: files, folders, fields of JSON lines, and Python's own documentation.

    "notes/book.txt"            one document
    "notes/"                    every .txt, .md and .rst file below, in order of path
    "chats.jsonl#answer.text"   one document a line: the field of that dotted path
    "python:pydoc_data.topics"  every long string in the source of a standard-library module, which is read, not run
    "dataset:..."               a column of a data set (see `llmpack.calibration.data_set`)

Python's documentation is on every machine and differs between versions, so a corpus made from it carries its digest.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmpack.calibration import data_set
from llmpack.errors import Problem, RecipeError
from llmpack.units import format_size

SUFFIXES = (".txt", ".md", ".rst")
SHORTEST_STRING = 200
"""Characters from which a string of a Python module counts as text."""
MOST = 256 << 20
"""Bytes of text that are read at most, of all sources together."""


class _NoTextError(Exception):
    """Why one source gives no text."""


def read_texts(sources: Sequence[str], base: Path, *, offline: bool = False) -> list[str]:
    """The documents of all sources, in order.

    base     the folder where relative paths start
    offline  touch no network

    Raises RecipeError with every source that gives no text, EnvironmentProblem for data sets that cannot be read here.
    """
    problems, texts, total = [], [], 0
    for source in sources:
        try:
            found = list(_read(source, base, offline))
            if not any(text.strip() for text in found):
                raise _NoTextError("there is no text in it")
        except _NoTextError as why:
            problems.append(Problem(f"`{source}`: {why}"))
            continue
        texts += found
        total += sum(len(text.encode()) for text in found)
        if total > MOST:
            problems.append(Problem(f"`{source}`: more than {format_size(MOST)} of text in all; name a part of it"))
            break
    if problems:
        raise RecipeError(problems)
    return texts


def missing_texts(sources: Sequence[str], base: Path) -> list[Problem]:
    """What of the sources is not there or is no source, as far as it can be seen without reading or fetching text."""
    problems = []
    for source in sources:
        try:
            _find(source, base)
        except _NoTextError as why:
            problems.append(Problem(f"`{source}`: {why}"))
    return problems


def _find(source: str, base: Path) -> None:
    kind, _, rest = source.partition(":")
    if kind == "python" and rest:
        _module_file(rest)
        return
    if kind == data_set.KIND and rest:
        try:
            data_set.parse(rest, base)
        except ValueError as why:
            raise _NoTextError(str(why)) from why
        return
    name, _, field = source.partition("#")
    path = base / Path(name).expanduser()
    if path.is_dir():
        return
    if not path.is_file():
        raise _NoTextError(f"there is no such file or folder below {base}")
    if path.suffix == ".jsonl" and not field:
        raise _NoTextError(f"say which field of a line is the text: `{path.name}#FIELD`")
    if field and path.suffix != ".jsonl":
        raise _NoTextError("only .jsonl files have fields")


def _read(source: str, base: Path, offline: bool) -> Iterator[str]:
    _find(source, base)
    kind, _, rest = source.partition(":")
    if kind == "python" and rest:
        yield from _python_strings(rest)
        return
    if kind == data_set.KIND and rest:
        try:
            yield from data_set.rows(rest, base, offline=offline)
        except (ValueError, TypeError, LookupError) as why:
            raise _NoTextError(str(why)) from why
        return
    name, _, field = source.partition("#")
    path = base / Path(name).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise _NoTextError(f"no file in this folder ends in {', '.join(SUFFIXES)}")
        yield from (_file(file) for file in files)
    elif path.suffix == ".jsonl":
        yield from _lines(path, field)
    else:
        yield _file(path)


def _file(path: Path) -> str:
    size = path.stat().st_size
    if size > MOST:
        raise _NoTextError(f"{path.name} has {format_size(size)}; at most {format_size(MOST)} are read")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _NoTextError(f"{path.name} is not UTF-8 at byte {error.start}") from error


def _lines(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_file(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _NoTextError(f"line {number} is not JSON ({error})") from error
        for key in field.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, str):
            raise _NoTextError(f"line {number} has no text at `{field}`")
        yield value


def _module_file(module: str) -> Path:
    if module.partition(".")[0] not in sys.stdlib_module_names:
        raise _NoTextError("only modules of Python's standard library are read as text")
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise _NoTextError(f"this Python has no source for the module `{module}`")
    return Path(spec.origin)


def _python_strings(module: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(_file(_module_file(module)))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) >= SHORTEST_STRING:
            yield node.value
