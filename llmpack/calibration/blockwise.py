"""Healing block by block: each block that is left learns to lead where the whole model's blocks led.

Two streams of hidden states run over the same text, the whole model's and that of the blocks that are left. From the
block before the first gap on, each block is first changed in closed form (`llmpack.calibration.healing`), then all of
its numbers are fitted by some steps of gradient descent, so that it turns what it really sees into the whole model's
hidden states at the same place. Then it runs, and the next block sees what was healed.

Both streams lie on disk and one block is in memory, with its gradients and the optimizer's moments. What a block
learned is durable before the next one begins. Text is read in its order and nothing is drawn by chance, so a run that
was killed goes on at its block and ends in the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from llmpack.calibration.activations import Activations
from llmpack.calibration.corpus import Corpus
from llmpack.calibration.healing import close, relative_weight
from llmpack.checkpoint.atomic import write_atomic
from llmpack.checkpoint.tensors import torch_dtype
from llmpack.digest import sha256_value
from llmpack.errors import NumericalError
from llmpack.models.forward import BATCH_TOKENS, Block, Forward
from llmpack.progress import QUIET, Progress

if TYPE_CHECKING:
    import safetensors.torch as safetensors_torch
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")
    safetensors_torch = LazyModule("safetensors.torch")

STEP_TOKENS = 512
"""Tokens of one step of gradient descent, in whole sequences."""
LAST = 0.1
"""Share of the learning rate at the last step of a block; it falls in a line."""


@dataclass(frozen=True)
class Fit:
    """How a block learns.

    passes   how often it sees the text
    rate     learning rate of Adam at the first step
    damping  of the closed form that it starts from
    """

    passes: int
    rate: float
    damping: float


class Blockwise:
    """One healing of the blocks `kept` of a model, resumable in `work`.

    forward  of the whole model
    """

    def __init__(
        self, forward: Forward, corpus: Corpus, kept: Sequence[int], fit: Fit, work: Path, progress: Progress = QUIET
    ) -> None:
        self._forward, self._corpus, self._kept, self._fit = forward, corpus, tuple(kept), fit
        self._work, self._progress = work, progress
        facts = {
            "checkpoint": forward.checkpoint.digest,
            "corpus": corpus.digest,
            "kept": self._kept,
            "fit": asdict(fit),
            "batch": BATCH_TOKENS,
        }
        self._identity = sha256_value(facts)[:16]
        width = next(spec for spec in forward.graph.outside if spec.part == "embedding").shape[1]
        self._streams = Activations(work, self._identity, (len(corpus.tokens), corpus.length, width), 2)

    def run(self) -> dict[str, Tensor]:
        """New numbers for the tensors of blocks, by name, in the dtype in which they are stored.

        Raises NumericalError where a loss is not finite, EnvironmentProblem on a full disk.
        """
        self._work.mkdir(parents=True, exist_ok=True)
        if not all(self._path(index).exists() for index in self._changed()):
            with self._progress.task("healing block by block", len(self._kept)) as done:
                start = self._start()
                done(start)
                for place in range(start, len(self._kept)):
                    self._heal(place)
                    done(1)
            self._streams.keep_only(None)
        loaded = [safetensors_torch.load(self._path(index).read_bytes()) for index in self._changed()]
        return {name: values for one in loaded for name, values in one.items()}

    def _changed(self) -> tuple[int, ...]:
        """The blocks from the one before the first gap on; all, where the first block of the model is gone."""
        first = next((at for at, index in enumerate(self._kept) if index != at), len(self._kept))
        return self._kept[max(0, first - 1) :] if first < len(self._kept) or self._lacks_last() else ()

    def _lacks_last(self) -> bool:
        return self._kept[-1] + 1 < self._forward.graph.block_count

    def _path(self, index: int) -> Path:
        return self._work / f"healed-{self._identity}-{index:04d}.safetensors"

    def _start(self) -> int:
        """The place among `kept` to go on at, its streams on disk."""
        newest = self._streams.newest()
        if newest is not None:
            self._streams.keep_only(newest)
            return newest
        self._streams.keep_only(None)
        parts = self._streams.parts()
        own = (self._forward.embed(self._corpus.tokens[part]) for part in parts)
        self._streams.write(self._streams.reference_draft(0), own)
        self._lead(0, range(self._kept[0]))
        embedded = (self._forward.embed(self._corpus.tokens[part]) for part in parts)
        self._streams.write(self._streams.draft(0), chain(embedded, self._streams.read_reference_draft(0)))
        self._streams.begin(0)
        return 0

    def _lead(self, place: int, blocks: Sequence[int]) -> None:
        """Run the whole model's stream that waits for `place` through some of its blocks."""
        for index in blocks:
            block = self._forward.load_block(index)
            outputs = (self._forward.run(block, hidden) for hidden in self._streams.read_reference_draft(place))
            self._streams.write(self._streams.reference_draft(place), outputs)

    def _heal(self, place: int) -> None:
        """Heal one block, keep what it learned, and see to the streams of the next."""
        index, last = self._kept[place], place + 1 == len(self._kept)
        following = self._forward.graph.block_count if last else self._kept[place + 1]
        block = self._forward.load_block(index)
        outputs = (self._forward.run(block, hidden) for hidden in self._streams.read(place, 1))
        self._streams.write(self._streams.reference_draft(place + 1), outputs)
        self._lead(place + 1, range(index + 1, following))
        if index in self._changed():
            before = close(self._forward, block, self._pairs(place), self._fit.damping)
            learned = before | self._learn(block, place)
            write_atomic(self._path(index), safetensors_torch.save(learned))
        if not last:
            own = (self._forward.run(block, hidden) for hidden in self._streams.read(place))
            wanted = self._streams.read_reference_draft(place + 1)
            self._streams.write(self._streams.draft(place + 1), chain(own, wanted))
            self._streams.begin(place + 1)

    def _pairs(self, place: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What the block sees, and where it should lead, batch by batch."""
        return zip(self._streams.read(place), self._streams.read_reference_draft(place + 1), strict=True)

    def _learn(self, block: Block, place: int) -> dict[str, Tensor]:
        """Fit the numbers of a block, put them into it as they will be stored, and return them.

        They stay as they were where the text is not led any nearer.
        """
        specs = self._forward.graph.block(block.index)
        numbers = {spec.name: block.module.get_parameter(self._forward.module_path(spec)) for spec in specs}
        before = {name: value.detach().clone() for name, value in numbers.items()}
        first = self._loss(block, place)
        self._descend(block, place, list(numbers.values()))
        with torch.no_grad():
            for spec in specs:
                numbers[spec.name].copy_(numbers[spec.name].to(torch_dtype(spec.encoding)))
        last = self._loss(block, place)
        better = last < first
        kind = "now" if better else "kept as it was; it would be"
        self._progress.say(f"block {block.index}: relative error {first:.4g}, {kind} {last:.4g}")
        if not better:
            with torch.no_grad():
                for name, value in numbers.items():
                    value.copy_(before[name])
            return {}
        return {spec.name: numbers[spec.name].detach().to(torch_dtype(spec.encoding)).cpu().clone() for spec in specs}

    def _descend(self, block: Block, place: int, numbers: list[torch.nn.Parameter]) -> None:
        each = self._step_sequences
        steps = self._fit.passes * sum(-(-(part.stop - part.start) // each) for part in self._streams.parts())
        block.module.requires_grad_(True)
        optimizer = torch.optim.Adam(numbers, lr=self._fit.rate)
        try:
            for step, (own, wanted) in enumerate(self._steps(place)):
                optimizer.param_groups[0]["lr"] = self._fit.rate * (1 - (1 - LAST) * step / steps)
                loss = self._error(block, own, wanted).mean()
                if not math.isfinite(float(loss.detach())):
                    raise NumericalError(
                        f"healing block {block.index}: the loss of step {step + 1} is {float(loss.detach())}; lower "
                        f"heal_rate (it is {self._fit.rate:g})"
                    )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        finally:
            block.module.requires_grad_(False)

    @property
    def _step_sequences(self) -> int:
        return max(1, STEP_TOKENS // self._corpus.length)

    def _steps(self, place: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What each step learns from."""
        count = self._step_sequences
        for _ in range(self._fit.passes):
            for own, wanted in self._pairs(place):
                for start in range(0, len(own), count):
                    yield own[start : start + count], wanted[start : start + count]

    def _error(self, block: Block, own: Tensor, wanted: Tensor) -> Tensor:
        """[B, T] squared difference of a block's output from where it should lead, relative to that."""
        weight = relative_weight(wanted).to(self._forward.device)
        missing = wanted.to(self._forward.device) - self._forward.learning(block, own).float()
        return (missing * weight).pow(2).mean(-1)

    def _loss(self, block: Block, place: int) -> float:
        """Mean of `_error` over the text."""
        total = 0.0
        with torch.no_grad():
            for own, wanted in self._pairs(place):
                total += float(self._error(block, own, wanted).double().sum())
        return total / self._corpus.tokens.numel()
