"""Channels of the hidden states: chosen over the whole model, then taken out of every matrix, norm and embedding.

Two passes over the text: the first says what each channel is worth to all that read it, the second adjusts the
readers of each block for what they no longer see, from the moments of their inputs before anything was cut.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmpack.algorithms.hessian import HessianSum
from llmpack.algorithms.narrowing import compensated
from llmpack.calibration.corpus import Corpus
from llmpack.calibration.narrowing import (
    POST_NORM,
    PRE_NORM,
    HiddenChannels,
    norm_of,
    normed_squares,
    readers,
    rescaled,
)
from llmpack.calibration.walk import Visit, resume_point, walk
from llmpack.checkpoint.atomic import write_atomic
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.tensors import torch_dtype
from llmpack.checkpoint.writing import CheckpointWriter
from llmpack.models import family_of
from llmpack.models.forward import final_hidden
from llmpack.models.graph import ModelGraph
from llmpack.models.surgery import Kept, resized, sliced
from llmpack.steps.blocks import all_blocks_finished, require_blocks, shard_name
from llmpack.steps.step import Workbench

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")


@dataclass(frozen=True)
class HiddenCut:
    """One cut of hidden channels.

    damping     of least squares
    compensate  whether readers make up for what they lose
    """

    checkpoint: Checkpoint
    graph: ModelGraph
    corpus: Corpus
    bench: Workbench
    damping: float
    compensate: bool

    def choose(self, keep: int) -> Tensor:
        """[keep] int64, ascending: the channels that stay. Durable once found."""
        path = self.bench.work / "hidden.json"
        if path.exists():
            return torch.tensor(json.loads(path.read_bytes()), dtype=torch.int64)
        outside = {spec.part: spec for spec in self.graph.outside}
        channels = HiddenChannels(outside["embedding"].shape[1])
        for visit in self._visits("worth", 0):
            specs = readers(self.graph, visit.index)
            for name, total in visit.hessians(specs).items():
                weights = [visit.weight(spec.name) for spec in specs[name]]
                channels.add(weights, total.mean(), self.damping, compensate=self.compensate)
        head = outside.get("output", outside["embedding"])
        channels.add([self._weight(head.name)], self._final_moments(), self.damping, compensate=self.compensate)
        stays = channels.best(keep)
        write_atomic(path, json.dumps(stays.tolist()).encode())
        return stays

    def write(self, stays: Tensor, writer: CheckpointWriter) -> Checkpoint:
        """The checkpoint with these channels alone."""
        target = resized(self.graph, hidden=len(stays))
        kept = Kept(tuple(range(self.graph.block_count)), hidden=stays.numpy())
        if not all_blocks_finished(writer, self.graph):
            start = resume_point(self.checkpoint, self.graph, self.corpus, work=self.bench.work / "adjust")
            require_blocks(writer, start)
            for visit in self._visits("adjust", start):
                if writer.finished(shard_name(visit.index)) is None:
                    self._write(writer, target, kept, visit.index, self._block(visit, stays))
        if writer.finished(shard_name(None)) is None:
            self._write(writer, target, kept, None, self._outside(target, stays))
        return writer.finish()

    def _visits(self, name: str, start: int) -> Iterable[Visit]:
        return walk(
            self.checkpoint,
            self.graph,
            self.corpus,
            work=self.bench.work / name,
            start=start,
            progress=self.bench.progress,
            device=self.bench.processor,
            observe=True,
        )

    def _weight(self, name: str) -> Tensor:
        values = self.checkpoint.read(name).to(torch.float32)
        self.checkpoint.release([name])
        return values

    def _final_moments(self) -> Tensor:
        hidden = final_hidden(self.checkpoint, self.graph, self.corpus.tokens, self.bench.progress)
        total = HessianSum(hidden.shape[-1])
        total.add(hidden)
        return total.mean()

    def _block(self, visit: Visit, stays: Tensor) -> dict[str, Tensor]:
        """New numbers for the readers and norms of a block, by name; the others are only cut."""
        offset = family_of(self.graph.config).norm_offset
        moments = {name: total.mean() for name, total in visit.hessians().items()}
        changed: dict[str, Tensor] = {}
        for name, specs in readers(self.graph, visit.index).items():
            norm = norm_of(visit.specs, PRE_NORM[name])
            if norm is not None:
                weight = visit.weight(norm.name)
                squares = normed_squares(moments[name], weight, offset)
                changed[norm.name] = rescaled(weight, offset, squares, stays)
            if self.compensate:
                for spec in specs:
                    W = visit.weight(spec.name)
                    changed[spec.name] = compensated(W, moments[name], stays, self.damping)
        for name, gguf in POST_NORM.items():
            norm = norm_of(visit.specs, gguf)
            if norm is not None:
                (spec,) = (one for one in visit.specs if one.inputs == name)
                W = visit.weight(spec.name).double()
                squares = (W @ moments[name].double() * W).sum(1)
                changed[norm.name] = rescaled(visit.weight(norm.name), offset, squares, stays)
        return changed

    def _outside(self, target: ModelGraph, stays: Tensor) -> dict[str, Tensor]:
        """The embedding and the last norm at the size they had, and a head of its own adjusted."""
        family = family_of(self.graph.config)
        scale = family.embedding_scale(self.graph.config) / family.embedding_scale(target.config)
        parts = {spec.part: spec for spec in self.graph.outside}
        moments, norm = self._final_moments(), self._weight(parts["norm"].name)
        last = rescaled(norm, family.norm_offset, normed_squares(moments, norm, family.norm_offset), stays)
        embedding = self._weight(parts["embedding"].name)[:, stays].double() * scale
        changed = {parts["embedding"].name: embedding, parts["norm"].name: last}
        if "output" not in parts:
            changed[parts["norm"].name] = (last + family.norm_offset) / scale - family.norm_offset
        elif self.compensate:
            head = self._weight(parts["output"].name)
            changed[parts["output"].name] = compensated(head, moments, stays, self.damping)
        return changed

    def _write(
        self, writer: CheckpointWriter, target: ModelGraph, kept: Kept, block: int | None, changed: dict[str, Tensor]
    ) -> None:
        sizes = family_of(self.graph.config).sizes(self.graph.config)
        tensors = {}
        for spec in target.outside if block is None else target.block(block):
            if spec.name in changed:
                tensors[spec.name] = changed[spec.name].to(torch_dtype(spec.encoding))
            else:
                tensors[spec.name] = sliced(self.checkpoint.read(spec.name), self.graph[spec.name], sizes, kept)
        writer.write(shard_name(block), tensors)
        self.checkpoint.release(tensors)
