"""Safetensors bundles: an ordinary model folder, as transformers and the programs around it load one.

config.json, the tokenizer's files as they are in the checkpoint, and the tensors under a layout (see
`llmpack.formats.layouts`), in one file or in shards with an index. Sizes of all of it are known before a byte is
written, and tensors stream through a few MB at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmpack.checkpoint.atomic import copy_atomic, disk_errors, require_space, write_atomic
from llmpack.errors import StepFailed
from llmpack.formats.bundle import CONFIG
from llmpack.formats.facts import Facts
from llmpack.formats.layouts import TORCH_NAMES, Layout
from llmpack.formats.shards import INDEX, Shard, index_text, shards_of, write_shard
from llmpack.models.graph import ModelGraph, TensorSpec
from llmpack.progress import QUIET, Progress

if TYPE_CHECKING:
    import numpy as np

    from llmpack.checkpoint.checkpoint import Checkpoint

SHARD_BYTES = 5 * 10**9
"""Data of one file at most, where nothing else is asked: what transformers takes too."""


@dataclass(frozen=True)
class SafetensorsFormat:
    """How checkpoints become model folders.

    shard  bytes of one file at most
    """

    name: ClassVar[str] = "safetensors"

    layout: Layout
    shard: int = SHARD_BYTES

    @property
    def floats(self) -> str:
        """Encoding of what is stored as numbers."""
        return self.layout.floats

    def encode_graph(self, graph: ModelGraph) -> ModelGraph:
        """The graph with the floats that the folder holds; codes stay. Twice changes nothing.

        Raises StepFailed, naming the tensors that the layout cannot hold.
        """
        groups: dict[str, list[str]] = {}
        for spec in graph.tensors:
            if (problem := self.layout.problem(spec)) is not None:
                groups.setdefault(problem, []).append(spec.name)
        if groups:
            told = [f"{', '.join(names[:3])}{_more(names)}: {problem}" for problem, names in groups.items()]
            raise StepFailed(f'layout = "{self.layout.name}" cannot hold {"; ".join(told)}')
        if (problem := self.layout.graph_problem(graph)) is not None:
            raise StepFailed(f'layout = "{self.layout.name}": {problem}')
        floats = self.layout.floats
        return graph.with_encodings(lambda spec: floats if spec.encoding in TORCH_NAMES else spec.encoding)

    def totals(self, graph: ModelGraph) -> dict[str, tuple[int, int]]:
        """Tensors of the model and bytes as they are written, by encoding."""
        found: dict[str, tuple[int, int]] = {}
        for spec in graph.tensors:
            count, nbytes = found.get(self.layout.stored_as(spec), (0, 0))
            more = sum(entry.nbytes for entry in self.layout.entries(spec))
            found[self.layout.stored_as(spec)] = (count + 1, nbytes + more)
        return found

    def shards(self, graph: ModelGraph) -> tuple[Shard, ...]:
        """The files of weights."""
        return shards_of([self.layout.entries(spec) for spec in graph.tensors], self.shard)

    def config(self, graph: ModelGraph) -> dict[str, Any]:
        """config.json as a table: that of the model, with the type of its floats and how it is quantized."""
        found = {key: value for key, value in graph.config.items() if key not in ("dtype", "quantization_config")}
        found["torch_dtype"] = TORCH_NAMES[self.layout.floats]  # every version of transformers reads this name
        quantized = self.layout.quantization_config(graph)
        return found | ({"quantization_config": quantized} if quantized is not None else {})

    def small_files(self, graph: ModelGraph) -> dict[str, bytes]:
        """Every file that is made here apart from weights, by name."""
        config = json.dumps(self.config(graph), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        shards = self.shards(graph)
        found = {CONFIG: config.encode(), **self.layout.files(graph)}
        return found | ({INDEX: index_text(shards)} if len(shards) > 1 else {})

    def sizes(self, graph: ModelGraph, checkpoint: Checkpoint) -> dict[str, int]:
        """Exact bytes of every file of the model that `write` will make, by name."""
        graph = self.encode_graph(graph)
        found = {shard.file: shard.nbytes for shard in self.shards(graph)}
        found |= {name: len(data) for name, data in self.small_files(graph).items()}
        return found | {path.name: path.stat().st_size for path in checkpoint.tokenizer_files}

    def nbytes(self, graph: ModelGraph, checkpoint: Checkpoint, facts: Facts) -> int:
        """Exact bytes of all these files. `facts` are told by the model card alone."""
        return sum(self.sizes(graph, checkpoint).values())

    def write(
        self, checkpoint: Checkpoint, graph: ModelGraph, folder: Path, facts: Facts, progress: Progress = QUIET
    ) -> tuple[str, ...]:
        """Write the files into a folder; their names.

        Raises NumericalError for numbers beyond the range of the floats, MissingExtra, EnvironmentProblem on a full
        disk.
        """
        self.layout.require()
        graph = self.encode_graph(graph)
        sizes = self.sizes(graph, checkpoint)
        total = sum(sizes.values())
        require_space(folder, total)
        specs = {entry.name: spec for spec in graph.tensors for entry in self.layout.entries(spec)}
        with disk_errors(folder, total), progress.task("writing safetensors", float(total)) as done:
            for shard in self.shards(graph):
                inside = dict.fromkeys(specs[entry.name] for entry in shard.entries)
                wanted = [spec for spec in graph.tensors if spec in inside]
                for nbytes in write_shard(folder, shard, self._pieces(checkpoint, wanted)):
                    done(nbytes)
            for name, data in self.small_files(graph).items():
                write_atomic(folder / name, data)
            for path in checkpoint.tokenizer_files:
                copy_atomic(path, folder / path.name)
        return tuple(sizes)

    def _pieces(self, checkpoint: Checkpoint, specs: list[TensorSpec]) -> Iterator[tuple[str, np.ndarray]]:
        for spec in specs:
            yield from self.layout.pieces(checkpoint, spec)
            checkpoint.release([spec.name])


def _more(names: list[str]) -> str:
    return f" and {len(names) - 3} more" if len(names) > 3 else ""
