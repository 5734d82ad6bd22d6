"""A TOML file with the place of every key and value, so that an error can point at it.

`tomllib` gives the values and decides what is TOML; tree-sitter reads the same bytes a second time
only to say where things stand. What neither refuses and no recipe needs is refused here: dates,
NaN and infinities, whole numbers beyond 64 bits, values nested without end.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpack.errors import Problem, RecipeError

if TYPE_CHECKING:
    from tree_sitter import Node

Key = tuple[str | int, ...]

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_INTEGER = 2**63 - 1

_BARE = re.compile(r"[A-Za-z0-9_-]+\Z")
_TOMLLIB_PLACE = re.compile(r"\s*\(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)\Z")


def dotted(key: Key) -> str:
    """``step.0.exceptions."ffn.down"``: a path as recipes and `--set` write it."""
    return ".".join(str(part) if _BARE.match(str(part)) else f'"{part}"' for part in key)


@dataclass(frozen=True)
class TomlDocument:
    """The values of a TOML file and where each of them stands.

    file    name as shown in messages
    values  what `tomllib` read (with overrides applied)
    keys    path -> ``file:line:col`` of the key; elements of arrays have no key of their own
    places  path -> ``file:line:col`` of the value
    """

    file: str
    values: dict[str, Any]
    text: str = ""
    keys: Mapping[Key, str] = field(default_factory=dict)
    places: Mapping[Key, str] = field(default_factory=dict)

    def where(self, key: Key, *, of_key: bool = False) -> str:
        """Place of the value (or of the key) at that path, else of the nearest table around it."""
        if of_key and key in self.keys:
            return self.keys[key]
        for length in range(len(key), 0, -1):
            if key[:length] in self.places:
                return self.places[key[:length]]
        return self.file

    def problem(self, key: Key, message: str, *, of_key: bool = False, rule: str = "") -> Problem:
        """A problem with the value at that path."""
        return Problem(message, path=dotted(key), where=self.where(key, of_key=of_key), rule=rule)

    def with_overrides(self, assignments: Sequence[str]) -> TomlDocument:
        """The document with every ``path=value`` of the command line applied; raises RecipeError."""
        document = self
        problems: list[Problem] = []
        for assignment in assignments:
            try:
                document = document.with_override(assignment)
            except RecipeError as error:
                problems += error.problems
        problems += _unsuitable(document)
        if problems:
            raise RecipeError(problems)
        return document

    def with_override(self, assignment: str) -> TomlDocument:
        """The document with one ``path=value`` of the command line applied; raises RecipeError.

        The value is read as TOML, and as plain text where it is none (``350MiB``).
        """
        from llmpack.pipeline.toml_override import override

        values, key = override(self.values, assignment)
        places = {k: v for k, v in self.places.items() if k[: len(key)] != key}
        keys = {k: v for k, v in self.keys.items() if k[: len(key)] != key}
        return replace(self, values=values, keys={**keys, key: "--set"}, places={**places, key: "--set"})


def read_toml(path: Path) -> TomlDocument:
    """Read a file. Raises RecipeError with the place of what is wrong."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError([Problem(f"cannot be read: {error.strerror}", where=str(path))]) from error
    return parse_toml(data, str(path))


def parse_toml(data: bytes, file: str) -> TomlDocument:
    """Parse bytes. Raises RecipeError with the place of what is wrong."""
    text = _decode(data, file)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError([_syntax_problem(error, text, file)]) from error
    except RecursionError as error:
        raise RecipeError([Problem(f"values are nested deeper than {MAX_DEPTH} levels", where=file)]) from error
    except ValueError as error:  # int() refuses thousands of digits
        raise RecipeError(list(_long_integers(data, file)) or [Problem(str(error), where=file)]) from error
    keys, places = _positions(data, file)
    document = TomlDocument(file, values, text, keys, places)
    problems = list(_unsuitable(document))
    if problems:
        raise RecipeError(problems)
    return document


def _decode(data: bytes, file: str) -> str:
    if len(data) > MAX_BYTES:
        raise RecipeError([Problem(f"is {len(data)} bytes long; the limit is {MAX_BYTES}", where=file)])
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise RecipeError([Problem("begins with a byte order mark; save it as UTF-8 without one", where=f"{file}:1:1")])
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        message = f"byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        raise RecipeError([Problem(message, where=f"{file}:{line}:{column}")]) from error


def _syntax_problem(error: tomllib.TOMLDecodeError, text: str, file: str) -> Problem:
    message = str(error)
    match = _TOMLLIB_PLACE.search(message)
    if match is None:
        return Problem(f"not TOML: {message}", where=file)
    lines = text.splitlines() or [""]
    line = int(match["line"] or len(lines))
    column = int(match["column"] or len(lines[-1]) + 1)
    return Problem(f"not TOML: {message[: match.start()]}", where=f"{file}:{line}:{column}")


def _unsuitable(document: TomlDocument) -> Iterator[Problem]:
    """Values that TOML allows and no recipe may have."""
    stack: list[tuple[Key, Any]] = [((), document.values)]
    found: list[tuple[Key, str]] = []
    while stack:
        key, value = stack.pop()
        if len(key) > MAX_DEPTH:
            found.append((key[:1], f"values are nested deeper than {MAX_DEPTH} levels"))
        elif isinstance(value, dict):
            stack += [((*key, name), inner) for name, inner in value.items()]
        elif isinstance(value, list):
            stack += [((*key, index), inner) for index, inner in enumerate(value)]
        elif isinstance(value, float) and not math.isfinite(value):
            found.append((key, f"{value} is not a finite number"))
        elif isinstance(value, int) and abs(value) > MAX_INTEGER:
            found.append((key, "whole numbers end at 9223372036854775807 (64 bits)"))
        elif isinstance(value, date | datetime | time):
            found.append((key, f'{value} is a date; if text is meant, write "{value}"'))
    for key, message in dict.fromkeys(reversed(found)):
        yield document.problem(key, message)


def _tree(data: bytes) -> Node:
    import tree_sitter_toml
    from tree_sitter import Language, Parser

    return Parser(Language(tree_sitter_toml.language())).parse(data).root_node


def _place(node: Node, data: bytes, file: str) -> str:
    start = node.start_byte - node.start_point.column
    column = len(data[start : node.start_byte].decode()) + 1
    return f"{file}:{node.start_point.row + 1}:{column}"


def _long_integers(data: bytes, file: str) -> Iterator[Problem]:
    stack = [_tree(data)]
    while stack:
        node = stack.pop()
        stack += reversed(node.named_children)
        if node.type == "integer" and node.end_byte - node.start_byte > len(str(MAX_INTEGER)) + 1:
            digits = node.end_byte - node.start_byte
            yield Problem(f"a whole number of {digits} digits; they end at 64 bits", where=_place(node, data, file))


def _names(node: Node) -> list[tuple[str, Node]]:
    """The parts of a bare, quoted or dotted key, each with its node."""
    parts: list[tuple[str, Node]] = []
    stack = [node]
    while stack:
        part = stack.pop()
        if part.type == "dotted_key":
            stack += reversed(part.named_children)
        else:
            text = (part.text or b"").decode()
            parts.append((text if part.type == "bare_key" else next(iter(tomllib.loads(f"{text} = 0"))), part))
    return parts


class _Places:
    """Collects positions while the tree is walked; knows how often each array of tables was opened."""

    def __init__(self, data: bytes, file: str) -> None:
        self.data = data
        self.file = file
        self.keys: dict[Key, str] = {}
        self.places: dict[Key, str] = {}
        self._opened: dict[Key, int] = {}

    def resolve(self, base: Key, node: Node, *, opens: bool = False) -> Key:
        """The path that a key of the file means here; an array of tables means its last element."""
        names = _names(node)
        key = base
        for position, (name, part) in enumerate(names):
            key = (*key, name)
            place = _place(part, self.data, self.file)
            self.keys.setdefault(key, place)
            self.places.setdefault(key, place)
            last = position == len(names) - 1
            if last and opens:
                self._opened[key] = self._opened.get(key, -1) + 1
            if key in self._opened:
                key = (*key, self._opened[key])
                if last and opens:
                    self.places[key] = place
        return key

    def add_pair(self, base: Key, pair: Node) -> None:
        """One ``key = value``, with everything inside the value."""
        name, *values = pair.named_children
        key = self.resolve(base, name)
        stack = [(key, value) for value in values if value.type != "comment"]
        while stack:
            key, node = stack.pop()
            self.places[key] = _place(node, self.data, self.file)
            children = [child for child in node.named_children if child.type != "comment"]
            if node.type == "array":
                stack += [((*key, index), child) for index, child in enumerate(children)]
            elif node.type == "inline_table":
                for inner in children:
                    inner_name, *inner_values = inner.named_children
                    inner_key = self.resolve(key, inner_name)
                    stack += [(inner_key, value) for value in inner_values if value.type != "comment"]


def _positions(data: bytes, file: str) -> tuple[dict[Key, str], dict[Key, str]]:
    places = _Places(data, file)
    for node in _tree(data).named_children:
        if node.type == "pair":
            places.add_pair((), node)
        elif node.type in ("table", "table_array_element"):
            header, *pairs = (child for child in node.named_children if child.type != "comment")
            table = places.resolve((), header, opens=node.type == "table_array_element")
            for pair in pairs:
                places.add_pair(table, pair)
    return places.keys, places.places
