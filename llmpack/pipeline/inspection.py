"""What is in a model file or folder: tensors, encodings, bytes, bits per weight. Headers only, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.errors import UsageError


@dataclass(frozen=True)
class TensorRow:
    """One tensor; `nbytes` as it is stored."""

    name: str
    shape: tuple[int, ...]
    encoding: str
    nbytes: int

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Inspection:
    """A model as it lies on disk.

    kind   "gguf", "checkpoint" or "bundle"
    facts  what the file or config says of itself
    """

    kind: str
    path: Path
    nbytes: int
    facts: Mapping[str, Any]
    tensors: tuple[TensorRow, ...]

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(row.parameters for row in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits of all tensors by numbers in them; the container is not counted."""
        return 8 * sum(row.nbytes for row in self.tensors) / max(1, self.parameters)

    def by_encoding(self) -> dict[str, tuple[int, int, int]]:
        """Tensors, numbers and bytes of each encoding, the largest share first."""
        totals: dict[str, tuple[int, int, int]] = {}
        for row in self.tensors:
            count, numbers, nbytes = totals.get(row.encoding, (0, 0, 0))
            totals[row.encoding] = (count + 1, numbers + row.parameters, nbytes + row.nbytes)
        return dict(sorted(totals.items(), key=lambda item: -item[1][2]))

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "kind": self.kind,
            "path": str(self.path),
            "bytes": self.nbytes,
            "parameters": self.parameters,
            "bits_per_weight": self.bits_per_weight,
            "facts": dict(self.facts),
            "encodings": {
                name: {"tensors": count, "parameters": numbers, "bytes": nbytes}
                for name, (count, numbers, nbytes) in self.by_encoding().items()
            },
            "tensors": [
                {"name": row.name, "shape": list(row.shape), "encoding": row.encoding, "bytes": row.nbytes}
                for row in self.tensors
            ],
        }


def inspect(path: Path) -> Inspection:
    """Look into a GGUF file, a checkpoint folder or a bundle.

    Raises InputRejected for a damaged one, UsageError for anything else.
    """
    if path.is_file():
        return _gguf(path, path, "gguf")
    if (path / "manifest.json").is_file():
        return _bundle(path)
    if (path / "config.json").is_file():
        return _checkpoint(path)
    raise UsageError(
        f"{path}: neither a GGUF file, nor a checkpoint folder (config.json), nor a bundle (manifest.json)"
    )


def _bundle(path: Path) -> Inspection:
    if (path / "model.gguf").is_file() or not (path / "config.json").is_file():
        return _gguf(path / "model.gguf", path, "bundle")
    from llmpack.pipeline.model_folder import ModelFolder

    folder = ModelFolder.opened(path)
    rows = tuple(TensorRow(*row) for row in folder.rows())
    return Inspection("bundle", path, folder.size, _scalars(folder.config), rows)


def _scalars(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if isinstance(value, bool | int | float | str)}


def _gguf(file: Path, path: Path, kind: str) -> Inspection:
    opened = GgufFile.open(file)
    facts = _scalars(opened.metadata)
    facts = {key: value for key, value in facts.items() if not isinstance(value, str) or len(value) <= 200}
    rows = tuple(TensorRow(t.name, t.shape, t.encoding, t.nbytes) for t in opened.tensors.values())
    return Inspection(kind, path, opened.size, facts, rows)


def _checkpoint(path: Path) -> Inspection:
    checkpoint = Checkpoint.open(path)
    facts = _scalars(checkpoint.config)
    rows = tuple(TensorRow(t.name, t.shape, t.encoding, t.nbytes) for t in checkpoint.tensors.values())
    files = {t.file for t in checkpoint.tensors.values()}
    return Inspection("checkpoint", path, sum(file.stat().st_size for file in files), facts, rows)
