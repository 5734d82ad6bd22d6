"""The way back: gradients of the model's own predictions, block by block from the last to the first.

One forward pass stores the inputs of every block in files. Then labels are drawn from the predictions, and each block
in turn runs forward once more and backward, while hooks gather what its matrices read and the gradients by what they
put out. Peak memory is one block, its Hessians, and a batch of activations and gradients.

The gradients that leave a block are durable before the caller is given what was gathered in it, and those that came
in stay until the caller asks for the next block; so a caller that keeps its own results durably can go on at the
block where it was killed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llmpack.algorithms.hessian import HessianSum
from llmpack.algorithms.sensitivity import Peak, SquareSum, draw_labels
from llmpack.calibration.activations import Activations
from llmpack.calibration.corpus import Corpus
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.tensors import decode
from llmpack.digest import sha256_value
from llmpack.errors import NumericalError, StepFailed
from llmpack.models.forward import BATCH_TOKENS, Block, Forward
from llmpack.models.graph import ModelGraph
from llmpack.profile import phase
from llmpack.progress import QUIET, Progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

FORMAT = 1
HEAD_NUMBERS = 1 << 24
"""Logits that are held at once on the way back (64 MiB, a few times over)."""
HEAD, EMBEDDING = "head", "embedding"


@dataclass(frozen=True)
class Gathered:
    """What the way back found in one place.

    place      a block's index, `HEAD` or `EMBEDDING`
    hessians   ``E[x x^T]`` by name of the input (of the head: "head")
    peaks      largest number by name of the input
    gradients  ``E[g_o^2]`` [rows] float64 by name of the tensor
    tokens     of an embedding: the ids that occur, int64
    squares    of an embedding: [ids, columns] float64, the sum over the places of an id of squared gradients by its
               row, over the number of tokens
    """

    place: int | str
    hessians: dict[str, Tensor] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    tokens: Tensor | None = None
    squares: Tensor | None = None


class Backward:
    """The way back over one corpus, in a folder of its own.

    seed  of the labels that are drawn
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        graph: ModelGraph,
        corpus: Corpus,
        *,
        work: Path,
        seed: int,
        progress: Progress = QUIET,
    ) -> None:
        self._forward = Forward(checkpoint, graph)
        self._graph, self._corpus, self._progress, self._seed = graph, corpus, progress, seed
        self._embedding = next(spec for spec in graph.outside if spec.part == "embedding")
        facts = {"format": FORMAT, "checkpoint": checkpoint.digest, "corpus": corpus.digest, "batch": BATCH_TOKENS}
        shape = (corpus.tokens.shape[0], corpus.length, self._embedding.shape[1])
        self._inputs = Activations(work / "inputs", sha256_value(facts)[:16], shape)
        self._gradients = Activations(work / "gradients", sha256_value({**facts, "seed": seed})[:16], shape)
        for store in (self._inputs, self._gradients):
            store.folder.mkdir(parents=True, exist_ok=True)

    @property
    def places(self) -> list[int | str]:
        """Where it comes by, in order: the head, the blocks from the last to the first, the embedding."""
        return [HEAD, *reversed(range(self._graph.block_count)), EMBEDDING]

    def run(self, first: int | str = HEAD) -> Iterator[Gathered]:
        """What is found in each place from `first` on.

        Raises StepFailed where the gradients that arrive at `first` were not saved, NumericalError for numbers that
        are not finite.
        """
        places = self.places
        for at in range(places.index(first), len(places)):
            place = places[at]
            if place == HEAD:
                self._go_forward()
                yield self._head()
            elif isinstance(place, int):
                yield self._block(place)
                self._gradients.path(place + 1).unlink()
                self._inputs.path(place + 1).unlink(missing_ok=True)
            else:
                yield self._rows()

    def _go_forward(self) -> None:
        """Store the inputs of every block and of the head."""
        inputs, forward, tokens = self._inputs, self._forward, self._corpus.tokens
        start = inputs.newest() or 0
        if not inputs.path(0).exists():
            start = 0
            inputs.write(inputs.path(0), (forward.embed(tokens[part]) for part in inputs.parts()))
        with self._progress.task("running forward", self._graph.block_count - start) as done:
            for index in range(start, self._graph.block_count):
                block = forward.load_block(index)
                inputs.write(inputs.path(index + 1), (forward.run(block, batch) for batch in inputs.read(index)))
                done(1)

    def _head(self) -> Gathered:
        last = self._graph.block_count
        spec = next((s for s in self._graph.outside if s.part == "output"), self._embedding)
        total, squares, peak = HessianSum(spec.shape[1]), SquareSum(spec.shape[0]), Peak()
        count, generator = self._corpus.tokens.numel(), torch.Generator().manual_seed(self._seed)
        chance = torch.rand(count, generator=generator, dtype=torch.float64)
        drawn = 0

        def draw(logits: Tensor) -> Tensor:
            nonlocal drawn
            drawn += len(logits)
            return draw_labels(logits, chance[drawn - len(logits) : drawn])

        def watch(read: Tensor, gradient: Tensor) -> None:
            total.add(read)
            peak.add(read)
            squares.add(gradient)

        def gradients() -> Iterator[Tensor]:
            step = max(1, HEAD_NUMBERS // spec.shape[0])
            tokens = self._corpus.tokens.numel()
            with self._progress.task("head", tokens) as done, phase("head, forward and back", tokens=tokens):
                for batch in self._inputs.read(last):
                    flat = batch.flatten(0, 1)
                    parts = []
                    for rows in torch.split(flat, step):
                        parts.append(self._forward.loss_gradient(rows, draw, watch))
                        done(len(rows))
                    yield torch.cat(parts).view_as(batch)

        self._gradients.write(self._gradients.path(last), gradients())
        return Gathered(HEAD, {HEAD: total.mean()}, {HEAD: peak.largest}, {spec.name: _finite(squares, HEAD)})

    def _block(self, index: int) -> Gathered:
        if not self._gradients.path(index + 1).exists():
            raise StepFailed(
                f"{self._gradients.folder} lacks the gradients of block {index}; delete it and start again"
            )
        block = self._forward.load_block(index)
        groups = self._graph.input_groups(index)
        sums = {name: (HessianSum(specs[0].shape[1]), Peak()) for name, specs in groups.items()}
        squares = {spec.name: SquareSum(spec.shape[0]) for specs in groups.values() for spec in specs}
        with ExitStack() as hooks:
            for name, specs in groups.items():
                for at, spec in enumerate(specs):
                    path = self._forward.module_path(spec).rpartition(".")[0]
                    seen = partial(_seen, sums[name] if at == 0 else None, squares[spec.name])
                    hooks.callback(block.module.get_submodule(path).register_forward_hook(seen).remove)
            self._gradients.write(self._gradients.path(index), self._pulled(block))
        return Gathered(
            index,
            {name: total.mean() for name, (total, _) in sums.items()},
            {name: peak.largest for name, (_, peak) in sums.items()},
            {name: _finite(total, f"block {index}, {name}") for name, total in squares.items()},
        )

    def _pulled(self, block: Block) -> Iterator[Tensor]:
        arriving = self._gradients.read(block.index + 1)
        with self._progress.task(f"block {block.index}, backward", self._corpus.tokens.numel()) as done:
            for hidden, gradient in zip(self._inputs.read(block.index), arriving, strict=True):
                yield self._forward.pull_back(block, hidden, gradient)
                done(hidden.shape[0] * hidden.shape[1])

    def _rows(self) -> Gathered:
        """Squared gradients by the rows of the embedding, through whatever scale the model puts on them."""
        ids, places = torch.unique(self._corpus.tokens, return_inverse=True)
        rows = self._forward.checkpoint.packed(self._embedding.name)[ids.numpy()]
        rows = decode(rows, self._embedding.encoding, (len(ids), self._embedding.shape[1])).double()
        squares = torch.zeros_like(rows)
        aligned = energy = 0.0
        pairs = zip(self._inputs.parts(), self._inputs.read(0), self._gradients.read(0), strict=True)
        for part, hidden, gradient in pairs:
            where = places[part].flatten()
            squares.index_add_(0, where, gradient.flatten(0, 1).double().square())
            chosen = rows[where]
            aligned += float((hidden.flatten(0, 1).double() * chosen).sum())
            energy += float(chosen.square().sum())
        scale = aligned / energy if energy > 0 else 0.0
        squares *= scale**2 / self._corpus.tokens.numel()
        return Gathered(EMBEDDING, tokens=ids, squares=squares)


def _seen(
    reads: tuple[HessianSum, Peak] | None, squares: SquareSum, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    if reads is not None:
        deque((one.add(inputs[0]) for one in reads), maxlen=0)
    output.register_hook(squares.add)  # type: ignore[no-untyped-call]


def _finite(total: SquareSum, where: str) -> Tensor:
    mean = total.mean()
    if not bool(torch.isfinite(mean).all()):
        raise NumericalError(f"{where}: gradients are not finite within {total.tokens} tokens of calibration text")
    return mean
