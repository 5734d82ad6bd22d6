"""The walk: blocks in order, each with the inputs that it really sees.

At every block the consumer gets the second moments of all inputs from one forward pass, replaces weights, and goes
on; the block then runs with the replaced weights and its outputs are the next block's inputs. So errors made in one
block are seen, and compensated, by the next.

A walk may carry a second stream beside it, the reference: the same text through the unchanged model. Each block then
also gives the moments between what it sees and what it would have seen.

Activations lie in a file between blocks and pass through memory a batch at a time: peak memory is one block, its
Hessians and one batch of each stream. The file of the newest block is durable before older ones go, so that a killed
walk starts again at that block, with the same bytes.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain, dropwhile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmpack.algorithms.drift import DriftSum
from llmpack.algorithms.hessian import HessianSum
from llmpack.allocator import give_back_memory
from llmpack.calibration.corpus import Corpus
from llmpack.checkpoint.atomic import disk_errors, fsync_folder, is_temporary, replaced_when_whole, require_space
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.digest import sha256_value
from llmpack.errors import StepFailed
from llmpack.models.forward import BATCH_TOKENS, Block, Forward, batches
from llmpack.models.graph import ModelGraph, TensorSpec
from llmpack.profile import uncount
from llmpack.progress import QUIET, Progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

FORMAT = 1


@dataclass(frozen=True)
class Moments:
    """Second moments of one input of a block.

    own    ``E[x x^T]`` of what the block sees
    drift  how far that is from what the unchanged model has at the same place
    """

    own: HessianSum
    drift: DriftSum


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
        return 4 * self.streams * int(np.prod(self.shape, dtype=np.int64))

    def newest(self) -> int | None:
        """The last block whose inputs are there, whole."""
        name = re.compile(rf"activations-{self.identity}-(\d{{4,}})\.f32")
        found = [int(match[1]) for path in self.folder.glob("activations-*") if (match := name.fullmatch(path.name))]
        whole = [index for index in found if self.path(index).stat().st_size == self.nbytes]
        return max(whole, default=None)

    def keep_only(self, index: int | None) -> None:
        """Remove every file of activations but that of one block."""
        for path in self.folder.iterdir():
            stale = path.name.startswith("activations-") and (index is None or path != self.path(index))
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

    def begin(self, index: int) -> None:
        """Let the draft become the inputs of block `index`, and remove those of all others."""
        self.draft(index).replace(self.path(index))
        fsync_folder(self.folder)
        self.keep_only(index)


class Visit:
    """One block, while the walk stands at it.

    index  of the block
    specs  its tensors
    """

    def __init__(
        self, forward: Forward, activations: Activations, index: int, progress: Progress, observe: bool
    ) -> None:
        self.index = index
        self.specs: tuple[TensorSpec, ...] = forward.graph.block(index)
        self._forward, self._activations, self._progress = forward, activations, progress
        self._observe, self._drafted, self._referred = observe, False, False
        self._block: Block | None = forward.load_block(index)
        self._replaced: set[str] = set()

    @property
    def _module(self) -> nn.Module:
        if self._block is None:
            raise ValueError(f"the walk has left block {self.index}")
        return self._block.module

    def _parameter(self, spec: TensorSpec) -> nn.Parameter:
        return self._module.get_parameter(self._forward.module_path(spec))

    def _spec(self, name: str) -> TensorSpec:
        for spec in self.specs:
            if spec.name == name:
                return spec
        raise KeyError(f"block {self.index} has no tensor {name!r}")

    def weight(self, name: str) -> Tensor:
        """A copy of a tensor, float32: of the checkpoint, or what it was replaced with, as the forward pass has it."""
        spec = self._spec(name)
        if name in self._replaced:
            return self._parameter(spec).to(device="cpu", dtype=torch.float32, copy=True)
        values = self._forward.checkpoint.read(name).to(torch.float32)
        self._forward.checkpoint.release([name])
        return values

    def replace(self, name: str, W: Tensor) -> None:
        """Let the block run with other numbers from now on.

        Raises ValueError for another shape, and in a walk that only observes.
        """
        spec = self._spec(name)
        if self._observe:
            raise ValueError(f"this walk only observes; {name} cannot be replaced")
        if tuple(W.shape) != spec.shape:
            raise ValueError(f"{name} is {list(spec.shape)}, its replacement {list(W.shape)}")
        self._replaced.add(name)
        self._parameter(spec).copy_(W)

    def hessians(self, inputs: Collection[str] | None = None) -> dict[str, HessianSum]:
        """Second moments of each input of the block (see `TensorSpec.inputs`), over every token of the corpus.

        One forward pass with the weights as they are now; where its outputs are not kept, it ends at the last of these
        inputs. inputs: only these, all for None.
        """
        sums = {name: HessianSum(columns, self._forward.device) for name, columns in self._widths(inputs).items()}
        keep = self._observe and not self._drafted
        with self._watched({name: total.add for name, total in sums.items()}, enough=not keep):
            self._run(keep=keep)
        give_back_memory()
        return sums

    def moments(self, inputs: Collection[str] | None = None) -> dict[str, Moments]:
        """Second moments of each input, and those between it and the reference's, over every token of the corpus.

        One forward pass of both streams, with the block as the checkpoint has it. Raises ValueError in a walk without a
        reference, and once something was replaced.
        """
        if self._activations.streams == 1 or self._replaced:
            raise ValueError("moments with the reference need a walk with one, and a block as it was")
        device = self._forward.device
        sums = {n: Moments(HessianSum(c, device), DriftSum(c, device)) for n, c in self._widths(inputs).items()}
        seen: dict[str, Tensor] = {}

        def both() -> Iterator[Tensor]:
            own = self._activations.read(self.index)
            for output in self._outputs(stream=1):
                reference = dict(seen)
                self._forward.run(Block(self.index, self._module), next(own))
                for name, one in sums.items():
                    one.own.add(seen[name])
                    one.drift.add(reference[name], seen[name])
                yield output

        with self._watched({name: partial(seen.__setitem__, name) for name in sums}):
            self._write_reference(both())
        give_back_memory()
        return sums

    def _widths(self, inputs: Collection[str] | None) -> dict[str, int]:
        groups = self._forward.graph.input_groups(self.index)
        return {name: specs[0].shape[1] for name, specs in groups.items() if inputs is None or name in inputs}

    def _watched(self, take: Mapping[str, Callable[[Tensor], object]], *, enough: bool = False) -> ExitStack:
        """While it is open, each input of these names is given away whenever the block runs.

        enough: when all of them are, the block stops with `_SeenAllError`.
        """
        groups = self._forward.graph.input_groups(self.index)
        missing = set(take)

        def gave(name: str) -> None:
            missing.discard(name)
            if enough and not missing:
                missing.update(take)
                raise _SeenAllError(name)

        with ExitStack() as hooks:
            for name, receive in take.items():
                path = self._forward.module_path(groups[name][0]).rpartition(".")[0]
                give = partial(_give_input, receive, partial(gave, name))
                hooks.callback(self._module.get_submodule(path).register_forward_pre_hook(give).remove)
            return hooks.pop_all()

    def _write_reference(self, outputs: Iterator[Tensor]) -> None:
        """Keep the reference's outputs until the walk leaves; after the last block nobody reads them."""
        if self.index + 1 < self._forward.graph.block_count and not self._referred:
            self._activations.write(self._activations.reference_draft(self.index + 1), outputs)
            self._referred = True
        else:
            deque(outputs, maxlen=0)

    def _run(self, keep: bool) -> None:
        """Run the block over the corpus; keep: its outputs are drafted as the inputs of the next block."""
        if keep and self.index + 1 < self._forward.graph.block_count:
            following = self._activations.read_reference_draft(self.index + 1) if self._referred else iter(())
            self._activations.write(self._activations.draft(self.index + 1), chain(self._outputs(), following))
            self._drafted = True
        else:
            deque(self._outputs(), maxlen=0)

    def _outputs(self, stream: int = 0) -> Iterator[Tensor]:
        count, length, _ = self._activations.shape
        block = Block(self.index, self._module)
        with self._progress.task(f"block {self.index}", count * length) as done:
            for hidden in self._activations.read(self.index, stream):
                try:
                    yield self._forward.run(block, hidden)
                except _SeenAllError as seen:
                    uncount("forward", 2.0 * hidden.shape[0] * length * self._after(str(seen)))
                done(hidden.shape[0] * length)

    def _after(self, inputs: str) -> int:
        """Parameters of the linear maps that read an input or one after it."""
        late = list(dropwhile(lambda group: group[0] != inputs, self._forward.graph.input_groups(self.index).items()))
        return sum(spec.parameters for _, specs in late for spec in specs)

    def leave(self) -> None:
        """Called by the walk: see to the inputs of the next block, and give the memory of this one back."""
        if self._activations.streams > 1 and not self._referred:
            self.moments(())
        if not self._drafted:
            self._run(keep=True)
        self._activations.begin(self.index + 1)
        self._block = None
        self._replaced.clear()
        give_back_memory()


class _SeenAllError(Exception):
    """Every input that was asked for has been seen, the one it names last; nobody needs the outputs of the block."""


def _give_input(
    receive: Callable[[Tensor], object], then: Callable[[], None], _: nn.Module, given: tuple[Tensor, ...]
) -> None:
    receive(given[0])
    then()


def _activations(
    checkpoint: Checkpoint, graph: ModelGraph, corpus: Corpus, work: Path, dtype: torch.dtype, reference: bool
) -> Activations:
    hidden = next(spec for spec in graph.outside if spec.part == "embedding").shape[1]
    identity = sha256_value(
        {
            "format": FORMAT,
            "checkpoint": checkpoint.digest,
            "corpus": corpus.digest,
            "dtype": str(dtype),
            "batch": BATCH_TOKENS,
            "reference": reference,
        }
    )
    return Activations(work, identity[:16], (corpus.tokens.shape[0], corpus.length, hidden), 2 if reference else 1)


def resume_point(
    checkpoint: Checkpoint,
    graph: ModelGraph,
    corpus: Corpus,
    *,
    work: Path,
    dtype: torch.dtype | None = None,
    reference: bool = False,
) -> int:
    """The block at which a walk in `work` can start: 0, or the newest one whose inputs were saved."""
    if not work.is_dir():
        return 0
    return _activations(checkpoint, graph, corpus, work, dtype or torch.float32, reference).newest() or 0


def walk(
    checkpoint: Checkpoint,
    graph: ModelGraph,
    corpus: Corpus,
    *,
    work: Path,
    start: int = 0,
    progress: Progress = QUIET,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    observe: bool = False,
    reference: bool = False,
) -> Iterator[Visit]:
    """Visit the blocks from `start` on, in order.

    work       a folder for activations, of this step with these options alone; made if needed
    start      0, or what `resume_point` gives
    dtype      in which blocks run (float32); activations are kept as float32
    observe    nothing will be replaced: the pass that gathers `Visit.hessians` also makes the next block's inputs
    reference  carry the unchanged model beside, for `Visit.moments`

    When the next visit is asked for, the block runs with whatever was replaced in it, and the visit before is over.
    After the last block nothing runs, since nobody reads its outputs, and no activations are left.
    Raises StepFailed where the inputs of block `start` were not saved.
    """
    work.mkdir(parents=True, exist_ok=True)
    activations = _activations(checkpoint, graph, corpus, work, dtype or torch.float32, reference)
    forward = Forward(checkpoint, graph, dtype, device)
    give_back_memory()
    if start == 0:
        activations.keep_only(None)
        parts = activations.parts() * activations.streams
        activations.write(activations.path(0), (forward.embed(corpus.tokens[part]) for part in parts))
    elif activations.newest() != start:
        raise StepFailed(f"{work} does not hold the inputs of block {start}; delete it and start again")
    for index in range(start, graph.block_count):
        visit = Visit(forward, activations, index, progress, observe)
        checkpoint.prefetch(spec.name for spec in graph.tensors if spec.block == index + 1)
        yield visit
        if index + 1 < graph.block_count:
            visit.leave()
    activations.keep_only(None)
