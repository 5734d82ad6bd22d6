"""quantize.rtn: every number to the nearest code, on scales that weigh inputs as the model uses them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from llmpack.calibration.walk import Visit, resume_point, walk
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.writing import CheckpointWriter
from llmpack.encodings import encoding
from llmpack.errors import StepFailed
from llmpack.models.graph import ModelGraph
from llmpack.steps.blocks import (
    Treated,
    all_blocks_finished,
    compute_threads,
    packed_as,
    plain_encode,
    require_blocks,
    shard_name,
    write_block,
    write_outside,
)
from llmpack.steps.host_memory import Batch, Moment, Walk, plain_moments, walk_moments
from llmpack.steps.quantize import Quantize
from llmpack.steps.step import Workbench

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")


class QuantizeRtn(Quantize):
    """Round every number to its nearest code.

    The scales of each group minimize the squared error weighted by the mean squared input of each column, over
    calibration text that runs through the model as it was: what llama.cpp does with an importance matrix. One
    forward pass; the embedding and the head are rounded without weights.
    """

    version: ClassVar[int] = 1

    importance: bool = True
    """Weigh inputs by calibration text. Without it no text is needed, and all inputs count the same."""

    @property
    def needs_corpus(self) -> bool:
        """Only to weigh inputs."""
        return self.importance

    @property
    def walks(self) -> bool:
        """To weigh inputs."""
        return self.importance

    def host_memory(self, graph: ModelGraph, batch: Batch | None) -> tuple[Moment, ...]:
        """One block and the second moments of its inputs; without importance one matrix."""
        target = self.preview(graph)
        if batch is None:
            return tuple(plain_moments(target))
        return tuple(walk_moments(graph, target, batch, Walk(factored=False)))

    def run(self, checkpoint: Checkpoint, graph: ModelGraph, bench: Workbench) -> Checkpoint:
        """Write the rounded checkpoint to ``bench.folder``."""
        target = self.preview(graph)
        writer = CheckpointWriter(bench.folder, checkpoint)
        with compute_threads(bench.threads):
            write_outside(writer, checkpoint, target, plain_encode, bench.progress)
            for block, weights in importances(checkpoint, graph, bench, writer, self.importance):
                write_block(writer, checkpoint, target, block, self._block(checkpoint, target, block, weights))
        return writer.finish()

    def _block(
        self, checkpoint: Checkpoint, target: ModelGraph, block: int, weights: dict[str, Tensor]
    ) -> dict[str, Treated]:
        treated = {}
        for spec in target.block(block):
            if spec.is_linear:
                W = checkpoint.read(spec.name).to(torch.float32)
                data = encoding(spec.encoding).encode(W, weights.get(str(spec.inputs)))
                treated[spec.name] = Treated(packed_as(spec, data))
        return treated


def importances(
    checkpoint: Checkpoint, graph: ModelGraph, bench: Workbench, writer: CheckpointWriter, weighted: bool
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Blocks that are not durable yet, each with the mean squared input of every column, by name of the input.

    The inputs are those of the model as `checkpoint` holds it: nothing that was rounded before is seen. Without
    `weighted` no text is read and there are no weights.
    """
    if not weighted:
        for block in range(graph.block_count):
            if writer.finished(shard_name(block)) is None:
                yield block, {}
        return
    if all_blocks_finished(writer, graph):
        return
    if bench.corpus is None:
        raise StepFailed("this step weighs inputs by calibration text, and there is none; add a [calibration] section")
    start = resume_point(checkpoint, graph, bench.corpus, work=bench.work)
    require_blocks(writer, start)
    for visit in walk(
        checkpoint,
        graph,
        bench.corpus,
        work=bench.work,
        start=start,
        progress=bench.progress,
        device=bench.processor,
        observe=True,
    ):
        if writer.finished(shard_name(visit.index)) is None:
            yield visit.index, _mean_squares(visit)


def _mean_squares(visit: Visit) -> dict[str, Tensor]:
    """Of every column of each input; the second moments themselves are not kept."""
    return {name: torch.diagonal(total.mean()).clone() for name, total in visit.hessians().items()}
