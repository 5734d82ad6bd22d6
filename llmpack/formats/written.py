"""A model folder as it was written, decoded by its layout and not by the loader that it is made for.

What a runtime computes is compared with this: a difference then is a fault of the layout or of how it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.mapped import MappedFile
from llmpack.checkpoint.safetensors_header import HeaderTensor, read_header
from llmpack.checkpoint.tensors import StoredTensor, decode
from llmpack.formats.layout_plain import float_entry
from llmpack.formats.safetensors_folder import SafetensorsFormat
from llmpack.models.graph import ModelGraph, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class WrittenTensors:
    """The tensors of a folder by the names under which they lie there. Raises InputRejected for a damaged header."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.placed: dict[str, tuple[MappedFile, HeaderTensor]] = {}
        for name in files:
            header = read_header(folder / name)
            mapped = MappedFile(header.path, header.size, header.identity)
            self.placed |= {tensor: (mapped, found) for tensor, found in header.tensors.items()}

    def packed(self, name: str) -> np.ndarray:
        """uint8 [bytes], mapped from the file. Raises KeyError for an unknown name."""
        file, found = self.placed[name]
        return file.view(found.offset, found.nbytes)

    def read(self, name: str) -> Tensor:
        """A copy in memory."""
        _, found = self.placed[name]
        kind = found.dtype.lower()
        return decode(self.packed(name).reshape(1, -1), kind, found.shape)

    def release(self, name: str) -> None:
        """Drop the resident pages of a tensor."""
        file, found = self.placed[name]
        file.release(found.offset, found.nbytes)


@dataclass(frozen=True, eq=False)
class Written(Checkpoint):
    """A written folder in place of the checkpoint that it was written from."""

    form: SafetensorsFormat
    specs: Mapping[str, TensorSpec]
    written: WrittenTensors
    content: str

    @classmethod
    def reading(
        cls, folder: Path, checkpoint: Checkpoint, graph: ModelGraph, form: SafetensorsFormat, content: str
    ) -> tuple[Written, ModelGraph]:
        """The folder as a checkpoint, and its graph.

        checkpoint  what it was written from; config and tokenizer are those
        content     digest of the folder
        """
        graph = form.encode_graph(graph)
        written = WrittenTensors(folder, [shard.file for shard in form.shards(graph)])
        floats, files = {}, {}
        for spec in graph.tensors:
            if form.layout.entries(spec) == (float_entry(spec, form.floats),):
                file, found = written.placed[spec.name]
                files[file.path] = file
                floats[spec.name] = StoredTensor(
                    spec.name, form.floats, spec.shape, file.path, found.offset, found.nbytes
                )
        made = cls(
            folder=folder,
            config=checkpoint.config,
            tensors=floats,
            tokenizer_files=checkpoint.tokenizer_files,
            _files=files,
            _digests={},
            form=form,
            specs={spec.name: spec for spec in graph.tensors},
            written=written,
            content=content,
        )
        return made, graph

    def read(self, name: str) -> Tensor:
        """The numbers that a loader computes with, float32."""
        spec = self.specs[name]
        values = self.form.layout.decode(self.written.read, spec)
        for entry in self.form.layout.entries(spec):
            self.written.release(entry.name)
        return values

    def release(self, names: object = None) -> None:
        """Nothing to do: `read` has dropped the pages already."""

    @cached_property
    def digest(self) -> str:
        """That of the folder."""
        return self.content
