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

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain, dropwhile
from pathlib import Path
from typing import TYPE_CHECKING

from llmpack.algorithms.drift import DriftSum
from llmpack.algorithms.hessian import HessianSum
from llmpack.allocator import give_back_memory
from llmpack.calibration.activations import Activations
from llmpack.calibration.corpus import Corpus
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.digest import sha256_value
from llmpack.errors import StepFailed
from llmpack.models.forward import BATCH_TOKENS, Block, Forward
from llmpack.models.graph import ModelGraph, TensorSpec
from llmpack.models.products import Products, products
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

    def to(self, device: torch.device | str) -> Moments:
        """These sums, moved to a device."""
        return Moments(self.own.to(device), self.drift.to(device))


class Visit:
    """One block, while the walk stands at it.

    index  of the block
    specs  its tensors
    """

    def __init__(
        self,
        forward: Forward,
        activations: Activations,
        index: int,
        progress: Progress,
        observe: bool,
        last: int,
        kind: Products,
    ) -> None:
        self.index, self._kind = index, kind
        self.specs: tuple[TensorSpec, ...] = forward.graph.block(index)
        self._forward, self._activations, self._progress = forward, activations, progress
        self._observe, self._drafted, self._referred = observe, False, False
        self._last = last  # the block whose outputs nobody reads
        self._block: Block | None = forward.load_block(index)
        self._replaced: set[str] = set()

    @property
    def _module(self) -> nn.Module:
        if self._block is None:
            raise ValueError(f"the walk has left block {self.index}")
        return self._block.module

    def parameter(self, name: str) -> nn.Parameter:
        """A tensor as the block runs with it."""
        return self._module.get_parameter(self._forward.module_path(self._spec(name)))

    def _spec(self, name: str) -> TensorSpec:
        for spec in self.specs:
            if spec.name == name:
                return spec
        raise KeyError(f"block {self.index} has no tensor {name!r}")

    def weight(self, name: str) -> Tensor:
        """A copy of a tensor, float32: of the checkpoint, or what it was replaced with, as the forward pass has it."""
        self._spec(name)
        if name in self._replaced:
            return self.parameter(name).to(device="cpu", dtype=torch.float32, copy=True)
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
        with torch.no_grad():
            self.parameter(name).copy_(W)

    def hessians(self, inputs: Collection[str] | None = None) -> dict[str, HessianSum]:
        """Second moments of each input of the block (see `TensorSpec.inputs`), over every token of the corpus.

        One forward pass with the weights as they are now; where its outputs are not kept, it ends at the last of these
        inputs. inputs: only these, all for None.
        """
        sums = {name: HessianSum(columns, self._forward.device) for name, columns in self._widths(inputs).items()}
        keep = self._observe and not self._drafted
        with products(self._kind), self._watched({n: total.add for n, total in sums.items()}, enough=not keep):
            self._run(keep=keep)
        give_back_memory()
        return {name: total.to("cpu") for name, total in sums.items()}

    def moments(self, inputs: Collection[str] | None = None) -> dict[str, Moments]:
        """Second moments of each input, and those between it and the reference's, but for sequences that decide later.

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
                if sums:
                    with self._watched(dict.fromkeys(sums, _look), enough=True):
                        self._through(next(own))
                for name, one in sums.items():
                    fitted = one.drift.add(reference[name], seen[name])
                    one.own.add(seen[name] if len(fitted) == len(seen[name]) else seen[name][fitted])
                yield output

        with products(self._kind), self._watched({name: partial(seen.__setitem__, name) for name in sums}):
            self._write_reference(both())
        give_back_memory()
        return {name: one.to("cpu") for name, one in sums.items()}

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
        """Keep the reference's outputs until the walk leaves, where somebody reads them."""
        if self.index != self._last and not self._referred:
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
        what = "outputs" if self._replaced else "inputs"
        with self._progress.task(f"block {self.index}, {what}", count * length) as done:
            for hidden in self._activations.read(self.index, stream):
                output = self._through(hidden)
                if output is not None:
                    yield output
                done(hidden.shape[0] * length)

    def _through(self, hidden: Tensor) -> Tensor | None:
        """What the block puts out, or None where it stopped since all inputs that were asked for had been seen."""
        try:
            return self._forward.run(Block(self.index, self._module), hidden)
        except _SeenAllError as seen:
            uncount("forward", 2.0 * hidden.shape[0] * hidden.shape[1] * self._after(str(seen)))
            return None

    def _after(self, inputs: str) -> int:
        """Parameters of the linear maps that read an input or one after it."""
        late = list(dropwhile(lambda group: group[0] != inputs, self._forward.graph.input_groups(self.index).items()))
        return sum(spec.parameters for _, specs in late for spec in specs)

    def pairs(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Sequences, the hidden states that the block sees there, and what the unchanged model has after it.

        Raises ValueError before `moments` in a walk with `outputs`.
        """
        if not self._referred:
            raise ValueError("what the unchanged model puts out is known after its pass, in a walk that keeps it")
        given, wanted = self._activations.read(self.index), self._activations.read_reference_draft(self.index + 1)
        yield from zip(self._activations.parts(), given, wanted, strict=True)

    def run(self, hidden: Tensor, *, learning: bool = False) -> Tensor:
        """Hidden states [B, T, D] after the block as it is now; learning: for gradients by its parameters."""
        block = Block(self.index, self._module)
        if not learning:
            return self._forward.run(block, hidden)
        with torch.enable_grad():
            return self._forward.learning(block, hidden)

    def leave(self) -> None:
        """Called by the walk: see to the inputs of the next block, and give the memory of this one back."""
        if self._activations.streams > 1 and not self._referred:
            self.moments(())
        if not self._drafted:
            with products(self._kind):
                self._run(keep=True)
        self._activations.begin(self.index + 1)
        self._block = None
        self._replaced.clear()
        give_back_memory()


class _SeenAllError(Exception):
    """Every input that was asked for has been seen, the one it names last; nobody needs the outputs of the block."""


def _look(_: Tensor) -> None:
    """Take nothing of an input; that it came is enough."""


def _give_input(
    receive: Callable[[Tensor], object], then: Callable[[], None], _: nn.Module, given: tuple[Tensor, ...]
) -> None:
    receive(given[0])
    then()


def _activations(
    checkpoint: Checkpoint,
    graph: ModelGraph,
    corpus: Corpus,
    work: Path,
    dtype: torch.dtype,
    reference: bool,
    kind: Products,
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
            "products": kind,
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
    kind: Products = "f32",
) -> int:
    """The block at which a walk in `work` can start: 0, or the newest one whose inputs were saved."""
    if not work.is_dir():
        return 0
    return _activations(checkpoint, graph, corpus, work, dtype or torch.float32, reference, kind).newest() or 0


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
    outputs: bool = False,
    kind: Products = "f32",
) -> Iterator[Visit]:
    """Visit the blocks from `start` on, in order.

    work       a folder for activations, of this step with these options alone; made if needed
    start      0, or what `resume_point` gives
    dtype      in which blocks run (float32); activations are kept as float32
    device     where a block runs and its inputs are summed; what a visit gives and takes is on the processor, but for
               `Visit.parameter` and `Visit.run`
    observe    nothing will be replaced: the pass that gathers `Visit.hessians` also makes the next block's inputs
    reference  carry the unchanged model beside, for `Visit.moments`
    outputs    with a reference: its outputs are for `Visit.pairs`, those of the last block too
    kind       how matrices are multiplied while the text runs through a block and moments are summed

    When the next visit is asked for, the block runs with whatever was replaced in it, and the visit before is over.
    After the last block nothing runs, since nobody reads its outputs, and no activations are left.
    Raises StepFailed where the inputs of block `start` were not saved.
    """
    work.mkdir(parents=True, exist_ok=True)
    activations = _activations(checkpoint, graph, corpus, work, dtype or torch.float32, reference, kind)
    forward = Forward(checkpoint, graph, dtype, device)
    give_back_memory()
    if start == 0:
        activations.keep_only(None)
        parts = activations.parts() * activations.streams
        activations.write(activations.path(0), (forward.embed(corpus.tokens[part]) for part in parts))
    elif activations.newest() != start:
        raise StepFailed(f"{work} does not hold the inputs of block {start}; delete it and start again")
    for index in range(start, graph.block_count):
        visit = Visit(forward, activations, index, progress, observe, -1 if outputs else graph.block_count - 1, kind)
        checkpoint.prefetch(spec.name for spec in graph.tensors if spec.block == index + 1)
        yield visit
        if index + 1 < graph.block_count:
            visit.leave()
    activations.keep_only(None)
