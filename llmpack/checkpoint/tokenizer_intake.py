"""Tokenizer files of a stranger: size, kind, and whether every token id has a row in the embedding.

tokenizer.json of a large model holds hundreds of thousands of merges, which nobody needs here; the file is
mapped and only the vocabulary and the added tokens are decoded, so that opening stays cheap.
Rules: ``tokenizer``, ``chat-template``, ``remote-code``, and those of the folder (``file-size``, ``symlink-escape``).
"""

from __future__ import annotations

import json
import mmap
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmpack.checkpoint.folder_intake import TOKENIZER_FILES, file_problem
from llmpack.checkpoint.stand_in import stand_in
from llmpack.checkpoint.strict_json import parse_json
from llmpack.errors import Problem

MAX_TEMPLATE = TOKENIZER_FILES["chat_template.jinja"]
MAX_TOKENS = 4_194_304
_LARGE = "tokenizer.json"

# Pieces of JSON as bytes. Possessive quantifiers: no input makes them slow or deep.
_SPACE = re.compile(rb"[ \t\r\n]*+")
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_SCALAR = re.compile(rb"[-+.\w]++")
_STEP = rb'[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+"'
# innermost arrays (the pairs of merges) are stepped over as a whole
_PLAIN = re.compile(rb"(?:%b|\[(?:%b)*+\])*+" % (_STEP, _STEP), re.DOTALL)


def tokenizer_files(folder: Path) -> tuple[tuple[Path, ...], list[Problem]]:
    """The known files that are there, in order of name, and what is wrong with opening them."""
    found, problems = [], []
    for name, limit in sorted(TOKENIZER_FILES.items()):
        path = folder / name
        if not (path.exists() or path.is_symlink()):
            continue
        problem = file_problem(folder, path, limit)
        if problem:
            rule = "chat-template" if name == "chat_template.jinja" and problem.rule == "file-size" else problem.rule
            problems.append(Problem(problem.message, where=problem.where, rule=rule))
        else:
            found.append(path)
    return tuple(found), problems


def tokenizer_problems(files: tuple[Path, ...], vocabulary: int | None) -> list[Problem]:
    """What is wrong inside the files.

    vocabulary  rows of the embedding as the config gives them (`vocab_size`), None if it does not say
    """
    problems = []
    for path in files:
        for rule, message in _file_problems(path, vocabulary):
            problems.append(Problem(message, where=str(path), rule=rule))
    return problems


def _file_problems(path: Path, vocabulary: int | None) -> Iterator[tuple[str, str]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
    reason = stand_in(path, head, size)
    if reason and not (size == 0 and path.name == "merges.txt"):
        yield "tokenizer", reason
    elif path.name == _LARGE:
        try:
            yield from _ids(path, vocabulary)
        except ValueError as error:
            yield "tokenizer", str(error)
    elif path.suffix == ".json":
        yield from _side_file(path)
    elif path.suffix == ".model" and head.startswith((b"\x80", b"PK", b"(", b"c__")):
        yield "tokenizer", "a pickle or an archive in place of a SentencePiece model; it is never opened"
    elif path.suffix in (".jinja", ".txt"):
        try:
            path.read_bytes().decode()
        except UnicodeDecodeError as error:
            yield "tokenizer", f"not UTF-8 at byte {error.start}"


def _side_file(path: Path) -> Iterator[tuple[str, str]]:
    try:
        table = parse_json(path.read_bytes())
    except ValueError as error:
        yield "tokenizer", str(error)
        return
    if not isinstance(table, dict):
        yield "tokenizer", "the file holds no JSON object"
        return
    if table.get("auto_map"):
        yield "remote-code", "`auto_map` asks to run Python code of the repository; llmpack never does that"
    templates = table.get("chat_template")
    for text in templates if isinstance(templates, list) else [templates]:
        body = text.get("template") if isinstance(text, dict) else text
        if isinstance(body, str) and len(body.encode()) > MAX_TEMPLATE:
            yield "chat-template", f"a chat template of {len(body.encode())} bytes; at most {MAX_TEMPLATE} are believed"


def _ids(path: Path, vocabulary: int | None) -> Iterator[tuple[str, str]]:
    vocab, added = _read_vocabulary(path)
    pairs = list(_vocabulary_pairs(vocab)) + list(_added_pairs(added))
    limit = MAX_TOKENS if vocabulary is None else vocabulary
    bad = [(text, i) for text, i in pairs if isinstance(i, bool) or not isinstance(i, int) or i < 0]
    for text, i in bad[:4]:
        yield "tokenizer", f"token {text[:40]!r} has the id {str(i)[:40]}, which is no whole number from 0 on"
    good = {(text, i) for text, i in pairs if isinstance(i, int) and not isinstance(i, bool) and i >= 0}
    outside = sorted((i, text) for text, i in good if i >= limit)
    if outside:
        yield (
            "tokenizer",
            f"{len(outside)} token ids have no row in the embedding of {limit} (first: {outside[0][0]} for "
            f"{outside[0][1][:40]!r}); the tokenizer belongs to another model, or the embedding was not resized",
        )
    twice = [i for i, count in Counter(i for _, i in good).items() if count > 1]
    if twice:
        names = sorted(text for text, i in good if i == twice[0])[:2]
        yield (
            "tokenizer",
            f"{len(twice)} ids stand for several tokens (first: {twice[0]} for {names[0]!r} and {names[1]!r})",
        )


def _vocabulary_pairs(vocab: Any) -> Iterator[tuple[str, Any]]:
    """(token, id) of a BPE or WordPiece table, or of a Unigram list of [token, score]."""
    if isinstance(vocab, dict):
        yield from vocab.items()
        return
    for position, entry in enumerate(vocab):
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise ValueError(f"entry {position} of the vocabulary is not [token, score]")
        yield entry[0], position


def _added_pairs(added: Any) -> Iterator[tuple[str, Any]]:
    for position, entry in enumerate(added):
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or "id" not in entry:
            raise ValueError(f"added token {position} has no content or no id")
        yield entry["content"], entry["id"]


def _read_vocabulary(path: Path) -> tuple[Any, Any]:
    """`model.vocab` (table or list) and `added_tokens` (list). Raises ValueError for anything else."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        top = dict(_members(data, 0))
        if "model" not in top:
            raise ValueError("the file has no `model`")
        model = dict(_members(data, top["model"][0]))
        if "vocab" not in model:
            raise ValueError("the model has no `vocab`")
        vocab = parse_json(data[slice(*model["vocab"])])
        added = parse_json(data[slice(*top["added_tokens"])]) if "added_tokens" in top else []
    if not isinstance(vocab, dict | list) or (added is not None and not isinstance(added, list)):
        raise ValueError("`vocab` or `added_tokens` has a form that no tokenizer uses")
    if len(vocab) > MAX_TOKENS:
        raise ValueError(f"{len(vocab)} tokens; at most {MAX_TOKENS} are believed")
    return vocab, added or []


def _members(data: mmap.mmap, start: int) -> list[tuple[str, tuple[int, int]]]:
    """Keys of the JSON object at `start` and where each value lies, without decoding the values."""
    position = _skip_space(data, start)
    _expect(data, position, b"{")
    position = _skip_space(data, position + 1)
    found: list[tuple[str, tuple[int, int]]] = []
    if data[position : position + 1] == b"}":
        return found
    while True:
        match = _STRING.match(data, position)
        if match is None:
            raise ValueError(f"not JSON: no key at byte {position}")
        key = json.loads(match[0])
        if any(key == known for known, _ in found):
            raise ValueError(f"the key {key[:80]!r} stands twice in one object")
        position = _skip_space(data, match.end())
        _expect(data, position, b":")
        begin = _skip_space(data, position + 1)
        end = _value_end(data, begin)
        found.append((key, (begin, end)))
        position = _skip_space(data, end)
        if data[position : position + 1] == b"}":
            return found
        _expect(data, position, b",")
        position = _skip_space(data, position + 1)


def _skip_space(data: mmap.mmap, position: int) -> int:
    match = _SPACE.match(data, position)
    return match.end() if match else position


def _expect(data: mmap.mmap, position: int, sign: bytes) -> None:
    if data[position : position + 1] != sign:
        raise ValueError(f"not JSON: no {sign.decode()!r} at byte {position}")


def _value_end(data: mmap.mmap, position: int) -> int:
    """First byte after the value at `position`; brackets are counted, strings are stepped over."""
    first = data[position : position + 1]
    if first == b'"':
        match = _STRING.match(data, position)
    elif first and first in b"[{":
        return _bracket_end(data, position)
    else:
        match = _SCALAR.match(data, position)
    if match is None:
        raise ValueError(f"not JSON: no value at byte {position}")
    return match.end()


def _bracket_end(data: mmap.mmap, position: int) -> int:
    depth = 0
    while True:
        sign = data[position : position + 1]
        if sign in (b"[", b"{"):
            depth += 1
        elif sign in (b"]", b"}"):
            depth -= 1
        else:
            raise ValueError(f"not JSON: a bracket is not closed before byte {position}")
        position += 1
        if depth == 0:
            return position
        match = _PLAIN.match(data, position)
        position = match.end() if match else position


def vocabulary_rows(config: Mapping[str, Any]) -> int | None:
    """Rows of the embedding by the config, also where a text model is nested in a larger one."""
    nested = config.get("text_config")
    value = config.get("vocab_size", nested.get("vocab_size") if isinstance(nested, Mapping) else None)
    return value if isinstance(value, int) else None
