"""Probes: the divergence that is measured when the matrices of one part are rounded, part by part.

The second-order model of `llmpack.algorithms.sensitivity` leaves out that the errors of one matrix at many places of
a text are of one mind; how much that matters differs between parts. One measurement for each part says by how much.

All probes run side by side, block by block: one block and one stream of activations for each part are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from llmpack.algorithms.divergence import Original, kl_divergence
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.encodings import encoding
from llmpack.encodings.encoding import GridEncoding
from llmpack.errors import NumericalError
from llmpack.models.forward import Block, Forward, batches, final_hidden
from llmpack.models.graph import ModelGraph, TensorSpec
from llmpack.profile import phase
from llmpack.progress import QUIET, Progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

TOKENS = 1024
"""Most tokens on which probes are measured: every part costs a forward pass over them."""
ENCODING = "q5_0"
"""What a probe rounds to: coarse enough to be seen, fine enough that divergences still add up."""
PLAIN = ""
CHUNK = 64
"""Tokens whose logits are compared at once."""


class Probes:
    """One probe for each part of a model.

    tokens  [N, T] int64
    """

    def __init__(self, checkpoint: Checkpoint, graph: ModelGraph, tokens: Tensor, progress: Progress = QUIET) -> None:
        self._forward, self._graph, self._tokens, self._progress = Forward(checkpoint, graph), graph, tokens, progress
        kind = encoding(ENCODING)
        assert isinstance(kind, GridEncoding)
        self._kind = kind
        self._tied = not any(spec.part == "output" for spec in graph.outside)
        probed = [s for s in graph.tensors if s.is_linear or s.part in ("embedding", "output")]
        unfit = {spec.part for spec in probed if kind.problem(spec.shape[-1]) is not None}
        self.parts = tuple(dict.fromkeys(spec.part for spec in probed if spec.part not in unfit))

    def run(self) -> dict[str, float]:
        """Divergence in nats per token by part. Raises NumericalError where it is not finite."""
        streams = {part: self._start(part) for part in (PLAIN, *self.parts) if part != "output"}
        with self._progress.task("probes", self._graph.block_count) as done:
            for index in range(self._graph.block_count):
                self._through(self._forward.load_block(index), streams)
                done(1)
        if "output" in self.parts:
            streams["output"] = streams[PLAIN]
        return self._divergences(streams)

    def _parts(self) -> list[slice]:
        return list(batches(*self._tokens.shape))

    def _rounded(self, W: Tensor, importance: Tensor | None = None) -> Tensor:
        with phase("round for probes", numbers=W.numel()):
            return self._kind.round(W, self._kind.fit(W, importance)).decode()

    def _start(self, part: str) -> Tensor:
        change = self._rounded if part == "embedding" else None
        return torch.cat([self._forward.embed(self._tokens[rows], change) for rows in self._parts()])

    def _through(self, block: Block, streams: dict[str, Tensor]) -> None:
        """Every stream through a block, each with its own part rounded."""
        specs = [spec for spec in self._graph.block(block.index) if spec.is_linear]
        with self._watched(block, specs) as importance:
            self._run(block, streams[PLAIN])
        for part, hidden in streams.items():
            if part == PLAIN:
                continue
            kept = {}
            for spec in specs:
                if spec.part == part:
                    weight = block.module.get_parameter(self._forward.module_path(spec))
                    kept[weight] = weight.detach().clone()
                    weight.copy_(self._rounded(kept[weight], importance[str(spec.inputs)]))
            self._run(block, hidden)
            for weight, before in kept.items():
                weight.copy_(before)

    def _run(self, block: Block, hidden: Tensor) -> None:
        for rows in self._parts():
            hidden[rows] = self._forward.run(block, hidden[rows])

    @contextmanager
    def _watched(self, block: Block, specs: list[TensorSpec]) -> Iterator[dict[str, Tensor]]:
        """Sums of the squares of each input's columns, while it is open."""
        first = {str(spec.inputs): spec for spec in reversed(specs)}
        sums = {name: torch.zeros(spec.shape[1]) for name, spec in first.items()}
        hooks = []
        for name, spec in first.items():
            module = block.module.get_submodule(self._forward.module_path(spec).rpartition(".")[0])
            hooks.append(module.register_forward_pre_hook(partial(_add_squares, sums[name])))
        try:
            yield sums
        finally:
            for hook in hooks:
                hook.remove()

    def _divergences(self, streams: dict[str, Tensor]) -> dict[str, float]:
        """Of every part's stream from the plain one, a few tokens at a time."""
        width = streams[PLAIN].shape[-1]
        normed = {part: self._forward.finish(one.reshape(1, -1, width))[0] for part, one in streams.items()}
        changed = next((p for p in self.parts if p == "output" or (p == "embedding" and self._tied)), None)
        head = self._rounded(self._forward.head()) if changed else None
        totals = dict.fromkeys(self.parts, 0.0)
        tokens = self._tokens.numel()
        with self._progress.task("probes, head", tokens) as done, phase("compare probes", tokens=tokens):
            for start in range(0, self._tokens.numel(), CHUNK):
                rows = slice(start, start + CHUNK)
                plain = self._forward.logits(normed[PLAIN][None, rows])[0]
                original = Original(torch.log_softmax(plain.double(), -1))
                for part in self.parts:
                    other = head if part == changed else None
                    logits = self._forward.logits(normed[part][None, rows], other)[0]
                    totals[part] += float(original.kl(logits).sum())
                done(len(plain))
        for part, total in totals.items():
            if not total < float("inf"):
                raise NumericalError(f"{part} rounded to {ENCODING}: the model's predictions are not finite")
        return {part: total / self._tokens.numel() for part, total in totals.items()}


def divergence(
    before: Checkpoint, after: Checkpoint, graphs: tuple[ModelGraph, ModelGraph], tokens: Tensor, progress: Progress
) -> float:
    """Mean divergence, nats per token, of one checkpoint's predictions from another's on tokens [N, T].

    graphs  of the two
    """
    sides = [Forward(one, graph) for one, graph in zip((before, after), graphs, strict=True)]
    hidden = [
        final_hidden(one, graph, tokens, progress).flatten(0, 1)
        for one, graph in zip((before, after), graphs, strict=True)
    ]
    total = 0.0
    for rows in zip(*(torch.split(one, CHUNK) for one in hidden), strict=True):
        p, q = (side.logits(part[None])[0].float() for side, part in zip(sides, rows, strict=True))
        total += float(kl_divergence(p, q).sum())
    return total / tokens.numel()


def _add_squares(total: Tensor, _: nn.Module, given: tuple[Tensor, ...]) -> None:
    total += given[0].detach().float().square().sum(dim=tuple(range(given[0].ndim - 1)))
