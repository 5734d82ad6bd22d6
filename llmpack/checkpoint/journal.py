"""Which shards of a checkpoint in the making are finished: one checked line a shard, fsynced after the shard.

A line is ``<first 16 hex digits of its sha256> <JSON>``. Reading stops at the first line that does not check out
(a write that was cut off); what follows it never counted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpack.checkpoint.atomic import write_atomic
from llmpack.checkpoint.safetensors_header import read_header
from llmpack.digest import sha256_bytes
from llmpack.errors import InputRejected

NAME = "llmpack-journal.jsonl"
FORMAT = 1


@dataclass(frozen=True)
class FinishedShard:
    """One durable shard: file name, size, sha256 of its header, {tensor: hex sha256 of its bytes}, the step's note."""

    shard: str
    file: str
    size: int
    header: str
    tensors: Mapping[str, str]
    note: Mapping[str, Any]


def _line(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
    return sha256_bytes(text)[:16].encode() + b" " + text + b"\n"


def _values(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines that check out and how many bytes they take."""
    values: list[dict[str, Any]] = []
    good = 0
    for line in path.read_bytes().splitlines(keepends=True):
        check, _, text = line.partition(b" ")
        if not line.endswith(b"\n") or sha256_bytes(text[:-1])[:16].encode() != check:
            break
        values.append(json.loads(text))
        good += len(line)
    return values, good


def header_digest(path: Path) -> str:
    """Hex sha256 of the length and the header of a safetensors file, without its data."""
    with path.open("rb") as file:
        length = file.read(8)
        return sha256_bytes(length + file.read(int.from_bytes(length, "little")))


class Journal:
    """The journal of one folder. `key` names what is being made; a journal of something else does not count."""

    def __init__(self, folder: Path, key: str) -> None:
        self._path = folder / NAME
        self.key = key

    def read(self) -> dict[str, FinishedShard] | None:
        """Finished shards by name, in order of writing; None if there is no journal with this key yet.

        A line counts only if its file is there with the size and the header that were written. What does not check
        out at the end is cut off, so that the next line begins cleanly.
        """
        if not self._path.exists():
            return None
        values, good = _values(self._path)
        if not values or values[0] != {"format": FORMAT, "key": self.key}:
            return None
        if good < self._path.stat().st_size:
            os.truncate(self._path, good)
        shards = (FinishedShard(**value) for value in values[1:])
        return {s.shard: s for s in shards if _stands(self._path.parent, s)}

    def begin(self) -> None:
        """Start an empty journal."""
        write_atomic(self._path, _line({"format": FORMAT, "key": self.key}))

    def add(self, shard: FinishedShard) -> None:
        """Append one line and make it durable. Raises OSError; then the journal is as it was."""
        before = self._path.stat().st_size
        try:
            with self._path.open("ab") as file:
                file.write(_line(vars(shard) | {"tensors": dict(shard.tensors), "note": dict(shard.note)}))
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            os.truncate(self._path, before)
            raise


def _stands(folder: Path, shard: FinishedShard) -> bool:
    path = folder / shard.file
    if not path.is_file() or path.stat().st_size != shard.size:
        return False
    try:
        header = read_header(path)
    except InputRejected:
        return False
    return header.tensors.keys() == shard.tensors.keys() and header_digest(path) == shard.header


def shard_notes(folder: Path) -> dict[str, Mapping[str, Any]]:
    """What a step noted with each shard of a finished folder, by name of the shard."""
    path = folder / NAME
    values = _values(path)[0] if path.exists() else []
    return {value["shard"]: value["note"] for value in values[1:]}


def tensor_digests(folder: Path) -> dict[str, str]:
    """Digests that the journal of a finished folder holds, for shards that still have their size and header."""
    path = folder / NAME
    if not path.exists():
        return {}
    values, _ = _values(path)
    if not values or values[0].get("format") != FORMAT:
        return {}
    shards = (FinishedShard(**value) for value in values[1:])
    return {name: digest for s in shards if _stands(folder, s) for name, digest in s.tensors.items()}
