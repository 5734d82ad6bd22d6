"""The tokenizer files of a checkpoint, parsed once. Needs neither torch nor transformers, and little memory:
the merges of a large vocabulary, most of tokenizer.json, are decoded only when asked for and some thousand at a time.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from llmpack.checkpoint.tokenizer_intake import json_members
from llmpack.errors import InputRejected, Problem

LARGE = "tokenizer.json"
_MERGES = "merges"
_BATCH = 256 << 10  # bytes of merges that are decoded at once
# Between two merges, pairs or texts; seldom something inside a token looks the same, and does not decode.
_BETWEEN_PAIRS = re.compile(rb'(?<!\\)"\s*\](\s*,)\s*(?=\[\s*")')
_BETWEEN_TEXTS = re.compile(rb'(?<!\\)"(\s*,)\s*(?=")')
_ATTEMPTS = 16


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files say; None or empty where a file does not exist.

    folder         where they lie, for messages
    tokenizer      tokenizer.json: vocabulary, added tokens, how text is split; without the merges
    config         tokenizer_config.json: names of special tokens, chat template
    added          added_tokens.json: token to id
    sentencepiece  tokenizer.model, as it is
    merges_text    merges.txt
    template_file  chat_template.jinja
    template_json  chat_template.json
    merges_at      where the list of merges lies in tokenizer.json, None where it has none
    """

    folder: Path
    tokenizer: Mapping[str, Any] | None = None
    config: Mapping[str, Any] | None = None
    added: Mapping[str, int] = field(default_factory=dict)
    sentencepiece: bytes | None = None
    merges_text: str | None = None
    template_file: str | None = None
    template_json: Mapping[str, Any] | None = None
    merges_at: tuple[int, int] | None = None

    @classmethod
    def read(cls, folder: Path, paths: Sequence[Path]) -> TokenizerFiles:
        """Parse those of `paths` that have a known name. Raises InputRejected with every file that does not parse."""
        by_name = {path.name: path for path in paths}
        problems: list[Problem] = []

        def parsed(name: str, parse: Callable[[Path], Any]) -> Any:
            path = by_name.get(name)
            if path is None:
                return None
            try:
                return parse(path)
            except ValueError as fault:
                problems.append(Problem(f"does not parse: {fault}", where=str(path), rule="tokenizer"))
                return None

        large = parsed(LARGE, _parse_large)
        tokenizer, merges_at = large if large is not None else (None, None)
        files = cls(
            folder=folder,
            tokenizer=tokenizer,
            config=parsed("tokenizer_config.json", _parse_table),
            added=parsed("added_tokens.json", _parse_table) or {},
            sentencepiece=parsed("tokenizer.model", Path.read_bytes),
            merges_text=parsed("merges.txt", _parse_text),
            template_file=parsed("chat_template.jinja", _parse_text),
            template_json=parsed("chat_template.json", _parse_table),
            merges_at=merges_at,
        )
        if problems:
            raise InputRejected(problems)
        return files

    def merge_batches(self) -> Iterator[list[Any]]:
        """The merges of tokenizer.json as they stand there, a text or a pair of texts each, some thousand at a time."""
        if self.merges_at is None:
            return
        at, end = self.merges_at[0] + 1, self.merges_at[1] - 1  # inside the brackets
        with _mapped(self.folder / LARGE) as data:
            while at < end:
                batch, at = _next_batch(data, at, end)
                yield batch

    def reject(self, name: str, *messages: str) -> InputRejected:
        """The error for what is wrong in one of the files (rule ``tokenizer``)."""
        where = str(self.folder / name)
        return InputRejected([Problem(message, where=where, rule="tokenizer") for message in messages])


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _next_batch(data: mmap.mmap, at: int, end: int) -> tuple[list[Any], int]:
    """Some elements of a JSON array and where the next one begins; cut where a cut leaves whole elements."""
    between = _BETWEEN_PAIRS if data[at : at + _BATCH].lstrip().startswith(b"[") else _BETWEEN_TEXTS
    search = at + _BATCH
    for _ in range(_ATTEMPTS):
        cut = between.search(data, search, end)
        if cut is None:
            break
        try:
            return from_json(b"[%b]" % data[at : cut.start(1)], cache_strings="all"), cut.end()
        except ValueError:  # inside a token
            search = cut.end()
    return from_json(b"[%b]" % data[at:end], cache_strings="all"), end


def _parse_large(path: Path) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """tokenizer.json without its merges, and where these lie."""
    if path.stat().st_size == 0:
        raise ValueError("an empty file")
    with _mapped(path) as data:
        places, _ = json_members(data, 0, entered="model")
        if hasattr(mmap, "MADV_DONTNEED"):
            data.madvise(mmap.MADV_DONTNEED)
        merges_at = places.pop(f"model.{_MERGES}", None)
        if merges_at is not None and data[merges_at[0] : merges_at[0] + 1] != b"[":
            raise ValueError("`merges` is no list")
        model = {
            key.removeprefix("model."): from_json(data[slice(*place)])
            for key, place in places.items()
            if key.startswith("model.")
        }
        others = {key: place for key, place in places.items() if key != "model" and not key.startswith("model.")}
        return {**{key: from_json(data[slice(*place)]) for key, place in others.items()}, "model": model}, merges_at


def _parse_table(path: Path) -> dict[str, Any]:
    table = from_json(path.read_bytes())
    if not isinstance(table, dict):
        raise ValueError("it holds no JSON object")
    return table


def _parse_text(path: Path) -> str:
    return path.read_bytes().decode()
