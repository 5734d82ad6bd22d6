"""What every pruning step does around its choice: refusals, a held-out part of the text, and writing what stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmpack.calibration.corpus import Corpus
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.tensors import torch_dtype
from llmpack.checkpoint.writing import CheckpointWriter
from llmpack.errors import InputRejected, Problem, RecipeError, StepFailed
from llmpack.models import family_of, open_model
from llmpack.models.graph import ModelGraph, TensorSpec
from llmpack.models.surgery import Kept, origins, sliced
from llmpack.steps.blocks import shard_name
from llmpack.steps.quantize import FLOATS

if TYPE_CHECKING:
    from torch import Tensor

OnDominated = Literal["say", "stop", "skip"]
HELD_OUT = 0.125
"""Share of the calibration text that pruning does not learn from: gates are judged on it."""


def split(corpus: Corpus | None, use: str) -> tuple[Corpus, Corpus]:
    """Sequences to learn from, and sequences that judge what was learned.

    The order of a corpus is by hash already, so its last part is a fair sample. Raises StepFailed without text, or
    with less than two sequences of it.
    """
    if corpus is None:
        raise StepFailed(f"{use} learns from calibration text, and there is none; add [calibration]")
    count = len(corpus.tokens)
    if count < 2:
        raise StepFailed(f"{use} judges its work on text that it has not seen, and one sequence cannot be split")
    held = max(1, round(count * HELD_OUT))
    return Corpus.of(corpus.tokens[: count - held]), Corpus.of(corpus.tokens[count - held :])


def require_floats(graph: ModelGraph) -> None:
    """Raises RecipeError where numbers are no floats any more: codes cannot be healed, and rounding comes last."""
    packed = sorted({spec.encoding for spec in graph.tensors} - set(FLOATS))
    if packed:
        text = f"the model is stored as {', '.join(packed)} already; prune first and quantize after it"
        raise RecipeError([Problem(text, "use")])


def promised(make: Callable[[], ModelGraph], path: str) -> ModelGraph:
    """What `make` gives, its refusals told of the option `path`."""
    try:
        return make()
    except InputRejected as refusal:
        raise RecipeError([Problem(p.message, path, rule=p.rule) for p in refusal.problems]) from refusal


def write_cut(
    writer: CheckpointWriter,
    checkpoint: Checkpoint,
    graph: ModelGraph,
    target: ModelGraph,
    kept: Kept,
    changed: Mapping[str, Tensor],
    note: Mapping[str, Any],
) -> None:
    """Write every shard that is not durable yet.

    kept     what stays of the model that `graph` describes
    changed  other numbers for some tensors, by their names in the model that `graph` describes, already cut; asked for
             one after the other
    note     kept in the journal with what is outside the blocks
    """
    sizes = family_of(graph.config).sizes(graph.config)
    source = origins(graph, kept.blocks)

    def cut(spec: TensorSpec) -> Tensor:
        old = source[spec.name]
        if old.name in changed:
            return changed[old.name].to(torch_dtype(spec.encoding))
        return sliced(checkpoint.read(old.name), old, sizes, kept)

    for block in (None, *range(target.block_count)):
        shard = shard_name(block)
        if writer.finished(shard) is None:
            specs = target.outside if block is None else target.block(block)
            writer.write(shard, {spec.name: cut(spec) for spec in specs}, note if block is None else None)
            checkpoint.release([source[spec.name].name for spec in specs])


def copy_checkpoint(
    checkpoint: Checkpoint, folder: Path, changed: Mapping[str, Tensor], note: Mapping[str, Any]
) -> Checkpoint:
    """The checkpoint in another folder, block by block, with other numbers in some tensors.

    changed  by name, in the dtype in which they are stored
    note     lies in the journal with what is outside the blocks
    """
    graph = open_model(checkpoint)
    writer = CheckpointWriter(folder, checkpoint)
    for block in (None, *range(graph.block_count)):
        if writer.finished(shard_name(block)) is None:
            specs = graph.outside if block is None else graph.block(block)
            tensors = {spec.name: changed.get(spec.name, checkpoint.stored(spec.name)) for spec in specs}
            writer.write(shard_name(block), tensors, note if block is None else None)
            checkpoint.release(tensors)
    return writer.finish()
