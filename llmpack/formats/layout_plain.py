"""The plain layout: every tensor under its own name as floats, an ordinary checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from llmpack.checkpoint.tensors import chunks
from llmpack.encodings import encoding
from llmpack.errors import NumericalError
from llmpack.formats.layouts import Entry, Layout
from llmpack.models.graph import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from llmpack.checkpoint.checkpoint import Checkpoint


@dataclass(frozen=True)
class Plain(Layout):
    """Floats of one type."""

    name: ClassVar[str] = "plain"

    def entries(self, spec: TensorSpec) -> tuple[Entry, ...]:
        """The tensor itself."""
        return (float_entry(spec, self.floats),)

    def pieces(self, checkpoint: Checkpoint, spec: TensorSpec) -> Iterator[tuple[str, np.ndarray]]:
        """Its rows, a few at a time."""
        return float_pieces(checkpoint, spec, self.floats)

    def decode(self, read: Callable[[str], Tensor], spec: TensorSpec) -> Tensor:
        """The numbers as they lie there."""
        return read(spec.name).float()


def float_entry(spec: TensorSpec, floats: str) -> Entry:
    """A tensor as floats under its own name."""
    return Entry(spec.name, floats.upper(), spec.shape)


def float_pieces(checkpoint: Checkpoint, spec: TensorSpec, floats: str) -> Iterator[tuple[str, np.ndarray]]:
    """The bytes of a float tensor as `floats`, in runs of a few MB. Raises NumericalError for too large numbers."""
    stored = checkpoint.tensors[spec.name]
    for rows in chunks(checkpoint.packed(spec.name)):
        yield spec.name, np.ascontiguousarray(_converted(rows, stored.encoding, spec, floats)).reshape(-1)


def _converted(rows: np.ndarray, stored: str, spec: TensorSpec, floats: str) -> np.ndarray:
    if stored == floats:
        return rows
    try:
        return encoding(floats).encode(encoding(stored).decode(rows, spec.shape[-1]))
    except ValueError as beyond:
        raise NumericalError(f'{spec.name}: {beyond}; set float = "bf16" or "f32" in [bundle]') from beyond
