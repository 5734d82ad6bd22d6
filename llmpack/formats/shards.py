"""Safetensors files that are written in any order: where each tensor lies is settled before the first byte.

Wide types come first in a file, so that every number is aligned: some loaders refuse others. Names of files and the
index are those of transformers (``model-00001-of-00002.safetensors``, ``model.safetensors.index.json``).
Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmpack.checkpoint.safetensors_header import DTYPE_BYTES
from llmpack.formats.layouts import Entry

if TYPE_CHECKING:
    import numpy as np
else:
    from llmpack.lazy import LazyModule

    np = LazyModule("numpy")

INDEX = "model.safetensors.index.json"
_ALIGNMENT = 8


@dataclass(frozen=True)
class Shard:
    """One file.

    head     length and header, as they are written
    offsets  of the data of each entry, from the start of the file, by name
    """

    file: str
    entries: tuple[Entry, ...]
    head: bytes
    offsets: dict[str, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self.head) + sum(entry.nbytes for entry in self.entries)

    @classmethod
    def of(cls, file: str, entries: Iterable[Entry]) -> Shard:
        """A file with these tensors."""
        ordered = tuple(sorted(entries, key=lambda entry: (-DTYPE_BYTES[entry.dtype], entry.name)))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # without it transformers refuses the file
        places, at = {}, 0
        for entry in ordered:
            header[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [at, at + entry.nbytes],
            }
            places[entry.name] = at
            at += entry.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        head = len(text).to_bytes(8, "little") + text
        return cls(file, ordered, head, {name: len(head) + place for name, place in places.items()})


def shards_of(groups: Sequence[tuple[Entry, ...]], most: int) -> tuple[Shard, ...]:
    """Files of at most `most` bytes of data each, in order; a group is never parted and may be larger alone."""
    parts: list[list[Entry]] = [[]]
    size = 0
    for group in groups:
        nbytes = sum(entry.nbytes for entry in group)
        if parts[-1] and size + nbytes > most:
            parts.append([])
            size = 0
        parts[-1] += group
        size += nbytes
    if len(parts) == 1:
        return (Shard.of("model.safetensors", parts[0]),)
    return tuple(
        Shard.of(f"model-{number:05d}-of-{len(parts):05d}.safetensors", part)
        for number, part in enumerate(parts, start=1)
    )


def index_text(shards: Sequence[Shard]) -> bytes:
    """The index of several files, as transformers reads it."""
    total = sum(entry.nbytes for shard in shards for entry in shard.entries)
    placed = {entry.name: shard.file for shard in shards for entry in shard.entries}
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def write_shard(folder: Path, shard: Shard, pieces: Iterable[tuple[str, np.ndarray]]) -> Iterator[int]:
    """Write one file from runs of bytes, which may come in any order of entries; yields how many bytes each run had.

    Raises AssertionError where the runs are not what was announced.
    """
    written = {entry.name: 0 for entry in shard.entries}
    with (folder / shard.file).open("wb") as file:
        file.write(shard.head)
        for name, data in pieces:
            file.seek(shard.offsets[name] + written[name])
            file.write(data.data)
            written[name] += data.nbytes
            yield data.nbytes
    wrong = [entry.name for entry in shard.entries if written[entry.name] != entry.nbytes]
    if wrong:
        raise AssertionError(f"{shard.file}: {', '.join(wrong[:3])} have other sizes than was announced")
