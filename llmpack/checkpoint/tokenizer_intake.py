"""Tokenizer files of a stranger: size, kind, and whether every token id has a row in the embedding.

tokenizer.json of a large model holds hundreds of thousands of merges, which nobody needs here; the file is
mapped and only the vocabulary and the added tokens are decoded, so that opening stays cheap.
Rules: ``tokenizer``, ``chat-template``, ``remote-code``, and those of the folder (``file-size``, ``symlink-escape``).
"""

from __future__ import annotations

import json
import mmap
import re
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
_TEXT = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_OTHER = rb'[^"\[\]{}]*+'
_SPACE = re.compile(rb"[ \t\r\n]*+")
_STRING = re.compile(_TEXT, re.DOTALL)
_SCALAR = re.compile(rb"[-+.\w]++")
# everything up to the next bracket, innermost arrays (the pairs of merges) stepped over as a whole
_INNERMOST = rb"\[%b(?:%b%b)*+\]" % (_OTHER, _TEXT, _OTHER)
_PLAIN = re.compile(rb"%b(?:(?:%b|%b)%b)*+" % (_OTHER, _TEXT, _INNERMOST, _OTHER), re.DOTALL)


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
    names = _names_by_id(vocab)
    for content, number in _added_pairs(added):
        if names.setdefault(number, content) != content:
            yield "tokenizer", f"the id {number} stands for {names[number][:40]!r} and for the added {content[:40]!r}"
    limit = MAX_TOKENS if vocabulary is None else vocabulary
    outside = sorted(number for number in names if number >= limit)
    if outside:
        yield (
            "tokenizer",
            f"{len(outside)} token ids have no row in the embedding of {limit} (first: {outside[0]} for "
            f"{names[outside[0]][:40]!r}); the tokenizer belongs to another model, or the embedding was not resized",
        )


def _check_id(token: str, number: Any) -> None:
    if type(number) is not int or number < 0:
        raise ValueError(f"token {token[:40]!r} has the id {str(number)[:40]}, which is no whole number from 0 on")


def _names_by_id(vocab: Any) -> dict[int, str]:
    """Of a BPE or WordPiece table {token: id}, or of a Unigram list of [token, score]."""
    if isinstance(vocab, list):
        for position, entry in enumerate(vocab):
            if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
                raise ValueError(f"entry {position} of the vocabulary is not [token, score]")
        return {position: entry[0] for position, entry in enumerate(vocab)}
    if any(kind is not int for kind in set(map(type, vocab.values()))) or min(vocab.values(), default=0) < 0:
        for token, number in vocab.items():
            _check_id(token, number)
    names = {number: token for token, number in vocab.items()}
    if len(names) < len(vocab):
        first, number = next((t, i) for t, i in vocab.items() if names[i] != t)
        text = f"{len(vocab) - len(names)} tokens share the id of another"
        raise ValueError(f"{text} (first: {number} for {first[:40]!r} and {names[number][:40]!r})")
    return names


def _added_pairs(added: list[Any]) -> Iterator[tuple[str, int]]:
    for position, entry in enumerate(added):
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or "id" not in entry:
            raise ValueError(f"added token {position} has no content or no id")
        _check_id(entry["content"], entry["id"])
        yield entry["content"], entry["id"]


def _read_vocabulary(path: Path) -> tuple[Any, list[Any]]:
    """`model.vocab` (table or list) and `added_tokens`. Raises ValueError for anything else."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        places, _ = json_members(data, 0, entered="model")
        if hasattr(mmap, "MADV_DONTNEED"):
            data.madvise(mmap.MADV_DONTNEED)  # the merges were stepped over and are not needed again
        if "model" not in places:
            raise ValueError("the file has no `model`")
        if "model.vocab" not in places:
            raise ValueError("the model has no `vocab`")
        vocab = parse_json(data[slice(*places["model.vocab"])])
        added = parse_json(data[slice(*places["added_tokens"])]) if "added_tokens" in places else None
    added = [] if added is None else added
    if not isinstance(vocab, dict | list) or not isinstance(added, list):
        raise ValueError("`vocab` or `added_tokens` has a form that no tokenizer uses")
    if len(vocab) > MAX_TOKENS:
        raise ValueError(f"{len(vocab)} tokens; at most {MAX_TOKENS} are believed")
    return vocab, added


def json_members(data: mmap.mmap, position: int, entered: str = "") -> tuple[dict[str, tuple[int, int]], int]:
    """Where each value of the JSON object at `position` lies, undecoded, and the first byte after the object.

    The members of the key `entered` are listed too, as ``entered.key``. Raises ValueError for what is no object.
    """
    position = _skip_space(data, position)
    _expect(data, position, b"{")
    position = _skip_space(data, position + 1)
    found: dict[str, tuple[int, int]] = {}
    while data[position : position + 1] != b"}":
        if found:
            _expect(data, position, b",")
            position = _skip_space(data, position + 1)
        match = _STRING.match(data, position)
        if match is None:
            raise ValueError(f"not JSON: no key at byte {position}")
        key = json.loads(match[0])
        if key in found:
            raise ValueError(f"the key {key[:80]!r} stands twice in one object")
        position = _skip_space(data, match.end())
        _expect(data, position, b":")
        begin = _skip_space(data, position + 1)
        if key == entered:
            inner, end = json_members(data, begin)
            found |= {f"{entered}.{name}": place for name, place in inner.items()}
        else:
            end = _value_end(data, begin)
        found[key] = (begin, end)
        position = _skip_space(data, end)
    return found, position + 1


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
