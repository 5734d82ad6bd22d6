"""Healing block by block: each block that is left learns, with its neighbours, to lead where the whole model's led.

Two streams of hidden states run over the same text, the whole model's and that of the blocks that are left. From the
block before the first gap on, each block is first changed in closed form (`llmpack.calibration.healing`). Then a window
slides over the blocks: all numbers of the blocks in it are fitted together by some steps of gradient descent, so that
they turn what the first of them really sees into the whole model's hidden states after each of them. What was learned
stays where it leads nearer on sequences that nothing learned from. The first block then stays as it is, runs, and the
window moves on by one: so a block learns with those before it, with those behind it, and at last as the first of its
window. (CBQ, Ding et al. 2023, arXiv:2312.07950, slides a window of blocks in the same way to fit rounding.)

The streams lie on disk; the blocks of one window are in memory, with their gradients and the optimizer's moments. What
a window learned is durable before the next one begins. Text is read in its order and nothing is drawn by chance, so a
run that was killed goes on at its window and ends in the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from llmpack.algorithms.drift import HELD_EVERY
from llmpack.calibration.activations import Activations
from llmpack.calibration.corpus import Corpus
from llmpack.calibration.healing import close, relative_weight
from llmpack.checkpoint.atomic import write_atomic
from llmpack.checkpoint.safetensors_header import read_header
from llmpack.checkpoint.tensors import torch_dtype
from llmpack.digest import sha256_value
from llmpack.errors import NumericalError
from llmpack.models.forward import BATCH_TOKENS, Block, Forward
from llmpack.progress import QUIET, Progress

if TYPE_CHECKING:
    import safetensors
    import safetensors.torch as safetensors_torch
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")
    safetensors = LazyModule("safetensors")
    safetensors_torch = LazyModule("safetensors.torch")

STEP_TOKENS = 512
"""Tokens of one step of gradient descent, in whole sequences."""
LAST = 0.1
"""Share of the learning rate at the last step of a window; it falls in a line."""


@dataclass(frozen=True)
class Fit:
    """How blocks learn.

    An eighth of the sequences judges what the others taught, the closed form included.

    passes   how often a window sees the text
    rate     learning rate of Adam at the first step
    damping  of the closed form that a block starts from
    window   how many blocks learn together
    """

    passes: int
    rate: float
    damping: float
    window: int = 1


class Learned(Mapping[str, "Tensor"]):
    """Numbers of tensors by name, in files; each is read when it is asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._file = {name: path for path in files for name in read_header(path).tensors}

    def __getitem__(self, name: str) -> Tensor:
        with safetensors.safe_open(self._file[name], "pt") as file:
            values: Tensor = file.get_tensor(name)
            return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)


class Blockwise:
    """One healing of the blocks `kept` of a model, resumable in `work`. A place is a position in `kept`.

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
        self._window: dict[int, Block] = {}
        self._led = 0

    def run(self) -> Mapping[str, Tensor]:
        """New numbers for the tensors of blocks, by name, in the dtype in which they are stored.

        Raises NumericalError where a loss is not finite, EnvironmentProblem on a full disk.
        """
        self._work.mkdir(parents=True, exist_ok=True)
        files = [self._path(index) for index in self._kept[self._first :]]
        if not all(path.exists() for path in files):
            with self._progress.task("healing block by block", len(self._kept)) as done:
                start = self._led = self._start()
                done(start)
                for place in range(start, len(self._kept)):
                    self._heal(place)
                    done(1)
        self._streams.keep_only(None)
        for path in self._work.glob(f"ahead-{self._identity}-*"):
            path.unlink()
        return Learned(files)

    @property
    def _first(self) -> int:
        """The place of the block before the first gap; 0 where the model's first block is gone."""
        gap = next((at for at, index in enumerate(self._kept) if index != at), len(self._kept))
        whole = gap == self._forward.graph.block_count
        return gap if whole else max(0, gap - 1)

    def _path(self, index: int) -> Path:
        return self._work / f"healed-{self._identity}-{index:04d}.safetensors"

    def _path_ahead(self, place: int) -> Path:
        """What the blocks behind the first one of the window at `place` had learned when it got there."""
        return self._work / f"ahead-{self._identity}-{place:04d}.safetensors"

    def _start(self) -> int:
        """The place to go on at, its streams on disk."""
        newest = self._streams.newest()
        self._streams.keep_only(newest)
        if newest is not None:
            return newest
        parts = self._streams.parts()
        own = (self._forward.embed(self._corpus.tokens[part]) for part in parts)
        self._streams.write(self._streams.reference_draft(0), own)
        for index in range(self._kept[0]):
            self._lead(index, self._streams.read_reference_draft(0), 0)
        embedded = (self._forward.embed(self._corpus.tokens[part]) for part in parts)
        self._streams.write(self._streams.draft(0), chain(embedded, self._streams.read_reference_draft(0)))
        self._streams.begin(0)
        return 0

    def _lead(self, index: int, hidden: Iterator[Tensor], place: int) -> None:
        """Run hidden states of the whole model through one of its blocks, to where the block at `place` begins."""
        block = self._forward.load_block(index)
        outputs = (self._forward.run(block, given) for given in hidden)
        self._streams.write(self._streams.reference_draft(place), outputs)

    def _lead_to(self, last: int, first: int) -> None:
        """See that the whole model's hidden states behind every place to `last` are there; `first` has its own."""
        for place in range(self._led, last + 1):
            following = [*self._kept, self._forward.graph.block_count][place + 1]
            given = self._streams.read(place, 1) if place == first else self._streams.read_reference_draft(place)
            self._lead(self._kept[place], given, place + 1)
            for index in range(self._kept[place] + 1, following):
                self._lead(index, self._streams.read_reference_draft(place + 1), place + 1)
            self._led = place + 1

    def _heal(self, place: int) -> None:
        """Let one window learn, keep its first block as it is then, and see to the streams of the next window."""
        learns = place >= self._first
        places = range(place, min(place + self._fit.window, len(self._kept)) if learns else place + 1)
        self._lead_to(places[-1], place)
        self._open(places)
        if learns:
            self._learn(places)
            write_atomic(self._path(self._kept[place]), safetensors_torch.save(self._changes(self._window[place])))
            if len(places) > 1:
                changes = (self._changes(self._window[at]) for at in places[1:])
                ahead = {name: values for one in changes for name, values in one.items()}
                write_atomic(self._path_ahead(place + 1), safetensors_torch.save(ahead))
        block = self._window.pop(place)
        if place + 1 < len(self._kept):
            own = (self._forward.run(block, hidden) for hidden in self._streams.read(place))
            wanted = self._streams.read_reference_draft(place + 1)
            self._streams.write(self._streams.draft(place + 1), chain(own, wanted))
            later = [self._streams.reference_draft(at) for at in range(place + 2, self._led + 1)]
            self._streams.begin(place + 1, later)
        self._path_ahead(place).unlink(missing_ok=True)

    def _open(self, places: range) -> None:
        """Load the blocks of a window that are not there yet: as they had learned before, or changed in closed form."""
        known = self._path_ahead(places[0])
        learned = Learned([known] if known.exists() else [])
        for place in places:
            if place in self._window:
                continue
            block = self._window[place] = self._forward.load_block(self._kept[place])
            if place < self._first:
                continue
            if place < places[0] + self._fit.window - 1 and known.exists():
                for spec in self._forward.graph.block(block.index):
                    if spec.name in learned:
                        block.module.get_parameter(self._forward.module_path(spec)).copy_(learned[spec.name])
            else:
                before = [self._window[at] for at in places if at < place]
                close(self._forward, block, self._pairs(before, places[0], place), self._fit.damping)

    def _pairs(self, before: Sequence[Block], first: int, place: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What the block at `place` sees of the text that is learned from, and where it should lead, batch by batch.

        before  the blocks between the one at `first` and it
        """
        given, wanted = self._streams.read(first), self._streams.read_reference_draft(place + 1)
        for part, hidden, goal in zip(self._streams.parts(), given, wanted, strict=True):
            taught = self._taught(part)
            if taught:
                seen = hidden[:taught]
                for block in before:
                    seen = self._forward.run(block, seen)
                yield seen, goal[:taught]

    def _changes(self, block: Block) -> dict[str, Tensor]:
        """The numbers of a block that are not those of the checkpoint, as they are stored."""
        found = {}
        for spec in self._forward.graph.block(block.index):
            now = block.module.get_parameter(self._forward.module_path(spec)).detach()
            stored = now.to(torch_dtype(spec.encoding)).cpu()
            if not torch.equal(stored, self._forward.checkpoint.read(spec.name).to(stored.dtype)):
                found[spec.name] = stored.clone()
            self._forward.checkpoint.release([spec.name])
        return found

    def _learn(self, places: range) -> None:
        """Fit the numbers of the blocks of a window, and put them in as they will be stored.

        They stay as they were where sequences that were kept out are not led any nearer, or where there are none.
        """
        blocks = [self._window[place] for place in places]
        name = f"block {blocks[0].index}" if len(blocks) == 1 else f"blocks {', '.join(str(b.index) for b in blocks)}"
        if not self._held:
            self._progress.say(f"{name}: changed in closed form alone; one sequence cannot be split to judge more")
            return
        pairs = [(block, spec) for block in blocks for spec in self._forward.graph.block(block.index)]
        numbers = [block.module.get_parameter(self._forward.module_path(spec)) for block, spec in pairs]
        before = [value.detach().clone() for value in numbers]
        first = self._loss(blocks, places)
        self._descend(blocks, places, numbers, name)
        with torch.no_grad():
            for value, (_, spec) in zip(numbers, pairs, strict=True):
                value.copy_(value.to(torch_dtype(spec.encoding)))
        last = self._loss(blocks, places)
        better = last < first
        kind = "now" if better else "kept as it was; it would be"
        self._progress.say(f"{name}: relative error on sequences kept out {first:.4g}, {kind} {last:.4g}")
        if not better:
            with torch.no_grad():
                for value, was in zip(numbers, before, strict=True):
                    value.copy_(was)

    def _descend(self, blocks: list[Block], places: range, numbers: list[torch.nn.Parameter], name: str) -> None:
        each, rate = self._step_sequences, self._fit.rate
        steps = self._fit.passes * sum(-(-self._taught(part) // each) for part in self._streams.parts())
        for block in blocks:
            block.module.requires_grad_(True)
        optimizer = torch.optim.Adam(numbers, lr=rate)
        try:
            for step, (own, wanted) in enumerate(self._steps(places)):
                optimizer.param_groups[0]["lr"] = rate * (1 - (1 - LAST) * step / steps)
                loss = self._error(blocks, own, wanted).mean()
                if not math.isfinite(float(loss.detach())):
                    raise NumericalError(
                        f"healing {name}: the loss of step {step + 1} is {float(loss.detach())}; lower "
                        f"heal_rate (it is {rate:g})"
                    )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        finally:
            for block in blocks:
                block.module.requires_grad_(False)

    @property
    def _step_sequences(self) -> int:
        return max(1, STEP_TOKENS // self._corpus.length)

    @property
    def _held(self) -> int:
        """How many sequences, the last ones, are not learned from. Their order is by hash: a fair sample."""
        count = len(self._corpus.tokens)
        return 0 if count == 1 else max(1, count // HELD_EVERY)

    def _taught(self, part: slice) -> int:
        """How many sequences of a batch are learned from."""
        return max(0, min(int(part.stop), len(self._corpus.tokens) - self._held) - int(part.start))

    def _batches(self, places: range) -> Iterator[tuple[slice, Tensor, tuple[Tensor, ...]]]:
        """The sequences of each batch, what the first block of a window sees, and where each block should lead."""
        wanted = zip(*(self._streams.read_reference_draft(place + 1) for place in places), strict=True)
        yield from zip(self._streams.parts(), self._streams.read(places[0]), wanted, strict=True)

    def _steps(self, places: range) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """What each step learns from."""
        for _ in range(self._fit.passes):
            for part, own, wanted in self._batches(places):
                taught = self._taught(part)
                for start, stop in pairwise([*range(0, taught, self._step_sequences), taught]):
                    yield own[start:stop], tuple(goal[start:stop] for goal in wanted)

    def _error(self, blocks: Sequence[Block], own: Tensor, wanted: Sequence[Tensor]) -> Tensor:
        """[B, T] squared difference from where each block should lead, relative to that; the mean over the blocks."""
        errors, hidden = [], own
        for block, goal in zip(blocks, wanted, strict=True):
            hidden = self._forward.learning(block, hidden)
            weight = relative_weight(goal).to(self._forward.device)
            errors.append(((goal.to(self._forward.device) - hidden.float()) * weight).pow(2).mean(-1))
        return torch.stack(errors).mean(0)

    def _loss(self, blocks: Sequence[Block], places: range) -> float:
        """Mean of `_error` over the sequences kept out."""
        total, tokens = 0.0, 0
        with torch.no_grad():
            for part, own, wanted in self._batches(places):
                taught = self._taught(part)
                if taught < len(own):
                    held = self._error(blocks, own[taught:], [goal[taught:] for goal in wanted])
                    total, tokens = total + float(held.double().sum()), tokens + held.numel()
        return total / tokens
