"""Inputs of blocks, kept in files between the passes that need them."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmpack.checkpoint.atomic import disk_errors, fsync_folder, is_temporary, replaced_when_whole, require_space
from llmpack.errors import StepFailed
from llmpack.models.forward import batches

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    np = LazyModule("numpy")
    torch = LazyModule("torch")


class Activations:
    """Inputs of one block for every sequence, [N, length, D] float32, in one file per block.

    A second stream, the reference's, follows the first in the file.

    The name of a file holds what they depend on: checkpoint, corpus and precision. What was replaced in the blocks
    before is not in it, so a folder belongs to one step with one set of options.
    """

    def __init__(self, folder: Path, identity: str, shape: tuple[int, int, int], streams: int = 1) -> None:
        self.folder, self.identity, self.shape, self.streams = folder, identity, shape, streams

    def path(self, index: int) -> Path:
        """The file of the inputs of block `index`."""
        return self.folder / f"activations-{self.identity}-{index:04d}.f32"

    @property
    def nbytes(self) -> int:
        """Bytes of a file."""
        return 4 * self.streams * math.prod(self.shape)

    def newest(self) -> int | None:
        """The last block whose inputs are there, whole."""
        name = re.compile(rf"activations-{self.identity}-(\d{{4,}})\.f32")
        found = [int(match[1]) for path in self.folder.glob("activations-*") if (match := name.fullmatch(path.name))]
        whole = [index for index in found if self.path(index).stat().st_size == self.nbytes]
        return max(whole, default=None)

    def keep_only(self, index: int | None, spared: Collection[Path] = ()) -> None:
        """Remove every file of activations but that of one block, and those that are `spared`."""
        kept = {*spared} if index is None else {*spared, self.path(index)}
        for path in self.folder.iterdir():
            stale = path.name.startswith("activations-") and path not in kept
            if stale or (is_temporary(path.name) and path.name.startswith(".activations-")):
                path.unlink()

    def parts(self) -> list[slice]:
        """The sequences of each batch."""
        return list(batches(self.shape[0], self.shape[1]))

    def read(self, index: int, stream: int = 0) -> Iterator[Tensor]:
        """The inputs of a block, batch by batch; stream 1 is the reference's."""
        return self._read(self.path(index), stream * self.nbytes // self.streams)

    def read_reference_draft(self, index: int) -> Iterator[Tensor]:
        """What `reference_draft` holds, batch by batch."""
        return self._read(self.reference_draft(index), 0)

    def _read(self, path: Path, offset: int) -> Iterator[Tensor]:
        with path.open("rb") as file:
            file.seek(offset)
            for part in self.parts():
                batch = torch.empty((part.stop - part.start, *self.shape[1:]), dtype=torch.float32)
                if file.readinto(batch.numpy().data.cast("B")) != 4 * batch.numel():
                    raise StepFailed(f"{path} ends early; delete it and start again")
                yield batch

    def write(self, path: Path, hidden: Iterable[Tensor]) -> None:
        """Store hidden states batch by batch, whole and durable."""
        require_space(self.folder, self.nbytes)
        with (
            disk_errors(self.folder, self.nbytes),
            replaced_when_whole(path) as temporary,
            temporary.open("wb") as file,
        ):
            for batch in hidden:
                file.write(batch.to(device="cpu", dtype=torch.float32).contiguous().numpy().data)

    def draft(self, index: int) -> Path:
        """Where inputs of block `index` wait until the block before is done with."""
        return self.path(index).with_suffix(".draft")

    def reference_draft(self, index: int) -> Path:
        """Where the reference's inputs of block `index` wait until those of the walk itself are there."""
        return self.path(index).with_suffix(".reference")

    def begin(self, index: int, spared: Collection[Path] = ()) -> None:
        """Let the draft become the inputs of block `index`, and remove those of all others but the files `spared`."""
        self.draft(index).replace(self.path(index))
        fsync_folder(self.folder)
        self.keep_only(index, spared)
