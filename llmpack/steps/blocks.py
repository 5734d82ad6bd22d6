"""What every quantizing step does around its rounding: block by block, durable, resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.journal import shard_notes
from llmpack.checkpoint.tensors import Packed, decode
from llmpack.checkpoint.writing import CheckpointWriter
from llmpack.encodings import encoding
from llmpack.encodings.encoding import Quantized
from llmpack.errors import NumericalError, StepFailed
from llmpack.models.graph import ModelGraph, TensorSpec
from llmpack.profile import phase
from llmpack.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    from llmpack.lazy import LazyModule

    np = LazyModule("numpy")
    torch = LazyModule("torch")

SLAB = 1 << 24
"""Numbers of a matrix outside the blocks that are decoded at once."""

Encode = Callable[[TensorSpec, "torch.Tensor"], "np.ndarray"]
"""Rounds rows of a matrix to the encoding of its spec, without calibration."""


@dataclass(frozen=True)
class Treated:
    """A rounded tensor and what is worth knowing about it (JSON values).

    rounded  its codes and grid, where something is still to be done with them
    """

    packed: Packed
    note: Mapping[str, Any] = field(default_factory=dict)
    rounded: Quantized | None = None


@contextmanager
def compute_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads; the order of its sums follows from them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def shard_name(block: int | None) -> str:
    """Name of the shard that holds a block, or what is outside all blocks."""
    return "outside" if block is None else f"block-{block:04d}"


def packed_as(spec: TensorSpec, data: np.ndarray) -> Packed:
    """Packed rows under the encoding of a spec."""
    return Packed(spec.encoding, spec.shape, data)


def write_outside(
    writer: CheckpointWriter, checkpoint: Checkpoint, target: ModelGraph, encode: Encode, progress: Progress
) -> None:
    """Write the shard of tensors outside the blocks: matrices encoded, everything else as it is."""
    if writer.finished("outside") is not None:
        return
    numbers = sum(spec.parameters for spec in target.outside)
    with progress.task("embedding", numbers) as done, phase("embedding and head", numbers=numbers):
        tensors = {}
        for spec in target.outside:
            tensors[spec.name] = _encoded(checkpoint, spec, encode, done)
        writer.write("outside", tensors)


def _encoded(checkpoint: Checkpoint, spec: TensorSpec, encode: Encode, done: Callable[[float], None]) -> Packed:
    stored = checkpoint.tensors[spec.name]
    if stored.encoding == spec.encoding:
        done(spec.parameters)
        return checkpoint.stored(spec.name)
    rows, columns = spec.shape
    data = np.empty((rows, encoding(spec.encoding).row_bytes(columns)), dtype=np.uint8)
    step = max(1, SLAB // columns)
    for start in range(0, rows, step):
        part = checkpoint.packed(spec.name)[start : start + step]
        values = decode(part, stored.encoding, (len(part), columns)).to(torch.float32)
        data[start : start + step] = encode(spec, values)
        done(values.numel())
    checkpoint.release([spec.name])
    return packed_as(spec, data)


def plain_encode(spec: TensorSpec, values: torch.Tensor) -> np.ndarray:
    """Round to nearest by the encoding's own search, all inputs weighing the same."""
    return encoding(spec.encoding).encode(values)


def write_block(
    writer: CheckpointWriter,
    checkpoint: Checkpoint,
    target: ModelGraph,
    block: int,
    treated: Mapping[str, Treated],
    note: Mapping[str, Any] | None = None,
) -> None:
    """Write one block durably, unless a run before did; tensors that were not treated stay as they are.

    note  what is worth knowing about the block (JSON values)
    """
    if writer.finished(shard_name(block)) is not None:
        return
    specs = target.block(block)
    tensors = {
        spec.name: treated[spec.name].packed if spec.name in treated else checkpoint.stored(spec.name) for spec in specs
    }
    notes = {name: dict(one.note) for name, one in treated.items() if one.note}
    with phase("write block"):
        writer.write(shard_name(block), tensors, {"tensors": notes, **(note or {})})
    checkpoint.release([spec.name for spec in specs])


def noted(folder: Path, blocks: int) -> dict[str, Any]:
    """What a step found, from the notes of a finished folder: of the whole, and of each block under "blocks".

    Notes of single tensors stay in the folder.
    """
    notes = shard_notes(folder)
    whole = dict(notes.get(shard_name(None), {}))
    found = {str(i): {k: v for k, v in notes.get(shard_name(i), {}).items() if k != "tensors"} for i in range(blocks)}
    known = {index: note for index, note in found.items() if note}
    return {**whole, "blocks": known} if known else whole


def all_blocks_finished(writer: CheckpointWriter, graph: ModelGraph) -> bool:
    """Whether a run before wrote every block."""
    return all(writer.finished(shard_name(index)) is not None for index in range(graph.block_count))


def require_blocks(writer: CheckpointWriter, start: int) -> None:
    """Before going on at block `start`: every block before it is durable. Raises StepFailed."""
    missing = [index for index in range(start) if writer.finished(shard_name(index)) is None]
    if missing:
        raise StepFailed(
            f"{writer.folder} lacks block {missing[0]}, though the run that was killed had come to block {start}; "
            "delete this folder and the one for work beside it, and start again"
        )


@contextmanager
def at_block(step: str, block: int, specs: Iterable[TensorSpec]) -> Iterator[None]:
    """Say in which step, block and tensors a NumericalError came up."""
    try:
        yield
    except NumericalError as error:
        names = ", ".join(spec.name for spec in specs)
        raise NumericalError(f"{step}, block {block}, {names}: {error}") from error
