"""prune.depth: fewer blocks, the ones before each gap changed to make up for it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from llmpack.calibration.ablation import changed_model
from llmpack.calibration.blockwise import Blockwise, Fit
from llmpack.calibration.choice import by_angle, by_influence, cheapest_run
from llmpack.calibration.corpus import Corpus
from llmpack.calibration.gate import mean_kl
from llmpack.calibration.healing import healed
from llmpack.checkpoint.atomic import write_atomic
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.writing import CheckpointWriter
from llmpack.errors import Problem, RecipeError
from llmpack.models import family_of, open_model
from llmpack.models.forward import Forward, final_hidden
from llmpack.models.graph import ModelGraph
from llmpack.models.surgery import Kept, resized
from llmpack.steps.amount import BUDGET, Amount, parameters, require_number
from llmpack.steps.blocks import compute_threads
from llmpack.steps.cutting import OnDominated, promised, require_floats, split, write_cut
from llmpack.steps.host_memory import Batch, Moment
from llmpack.steps.pruning_memory import comparing, fitting, learning_blocks, running
from llmpack.steps.step import Step, Workbench

if TYPE_CHECKING:
    from torch import Tensor

CHOICE = "choice.json"


class PruneDepth(Step):
    """Remove whole blocks, and let the blocks that are left make up for them in closed form.

    The blocks are chosen on calibration text, an eighth of which is held out: healing is kept only where it brings the
    model nearer to the source on that part. The result is a plain model with fewer blocks.
    """

    version: ClassVar[int] = 2
    unkeyed: ClassVar[frozenset[str]] = frozenset({"on_dominated"})

    drop: Amount | None = None
    """How much goes: a number of blocks, a share of them (0.125), the parameters to get down to ("90M"), or "budget":
    as little as `[budget]` allows."""

    blocks: tuple[int, ...] | None = None
    """The blocks to remove, counted from 0, in place of `drop`."""

    by: Literal["greedy", "influence", "angle"] = "greedy"
    """How `drop` chooses: greedily by KL divergence, measured anew after each block; or in one look at hidden states,
    by the influence of single blocks or the angle over a run of neighbours, both of which mislead on newer models."""

    choice_tokens: int = Field(default=1024, ge=1, le=2**24)
    """Tokens of calibration text on which blocks are chosen, in whole sequences."""

    heal: Literal["best", "every", "gaps", "blocks", "none"] = "best"
    """Which blocks are changed to make up for the lost ones: those before a gap, every one behind the first gap too, or
    none; "best" is whichever of these is nearest to the source on held-out text. These take seconds, in closed form;
    "blocks" also fits all numbers of every block behind the first gap, and of its neighbours, to the source's hidden
    states, which takes minutes, and keeps the best of all."""

    damping: float = Field(default=0.5, ge=0, le=10)
    """How little healing trusts the calibration text, as a share of the mean square of what it fits on."""

    heal_passes: int = Field(default=2, ge=1, le=1000)
    """How often blocks that learn together see the text with heal = "blocks"."""

    heal_rate: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    """Learning rate of heal = "blocks"."""

    heal_window: int = Field(default=2, ge=1, le=64)
    """How many blocks learn together with heal = "blocks": one and those behind it, in a window that moves on by one
    block. Time and memory grow with it."""

    on_dominated: OnDominated = "say"
    """What to do where the whole model, quantized to the same bytes, is predicted to lose less: say so, stop, or do not
    compare (`skip`), which saves scoring the source."""

    @property
    def needs_corpus(self) -> bool:
        """Unless blocks are named and not healed."""
        return self.blocks is None or self.heal != "none"

    @property
    def open_amount(self) -> str | None:
        """`drop`, where it is "budget"."""
        return "drop" if self.drop == BUDGET else None

    def amounts(self, graph: ModelGraph) -> Sequence[Step]:
        """Whole periods of blocks."""
        period = family_of(graph.config).period(graph.config)
        return [self.model_copy(update={"drop": count}) for count in range(period, graph.block_count, period)]

    def preview(self, graph: ModelGraph) -> ModelGraph:
        """As many blocks less. Which ones go does not show: blocks are equal, and patterns go on."""
        require_floats(graph)
        if (self.drop is None) == (self.blocks is None):
            message = "say how much goes with `drop`, or which blocks with `blocks`: one of the two"
            raise RecipeError([Problem(message, "drop")])
        if self.blocks is not None:
            stay = _without(graph, self._named(graph, self.blocks))
            return promised(lambda: resized(graph, blocks=stay), "blocks")
        _require_equal_blocks(graph)
        stay = list(range(graph.block_count - self._count(graph)))
        return promised(lambda: resized(graph, blocks=stay), "drop")

    def host_memory(self, graph: ModelGraph, batch: Batch | None) -> tuple[Moment, ...]:
        """Streams of hidden states: one for every block that may go, two for healing."""
        moments: list[Moment] = []
        if batch is not None and self.blocks is None and self.by == "greedy":
            tokens = max(batch.length, self.choice_tokens // batch.length * batch.length)
            streams = graph.block_count + 1
            moments += [running(graph, streams, tokens, batch), comparing(graph, streams, tokens)]
        if batch is not None and self.heal != "none":
            moments.append(fitting(graph, "ffn.out", "healing", 2, batch))
        if batch is not None and self.heal == "blocks":
            moments.append(learning_blocks(graph, batch, self.heal_window))
        return tuple(moments)

    def _named(self, graph: ModelGraph, blocks: Sequence[int]) -> tuple[int, ...]:
        last = graph.block_count - 1
        beyond = sorted({index for index in blocks if not 0 <= index <= last})
        twice = sorted({index for index in blocks if blocks.count(index) > 1})
        problems = []
        if beyond:
            said = ", ".join(map(str, beyond))
            problems.append(Problem(f"block {said} does not exist; the model has blocks 0-{last}", "blocks"))
        if twice:
            problems.append(Problem(f"block {', '.join(map(str, twice))} is named more than once", "blocks"))
        if not blocks:
            problems.append(Problem("no block is named; name some, or take the step out", "blocks"))
        elif not problems and len(blocks) > last:
            problems.append(Problem(f"all {last + 1} blocks would go; leave at least one", "blocks"))
        if problems:
            raise RecipeError(problems)
        return tuple(blocks)

    def _count(self, graph: ModelGraph) -> int:
        """How many blocks `drop` stands for. Raises RecipeError with the arithmetic where it cannot be."""
        total, period = graph.block_count, family_of(graph.config).period(graph.config)
        drop = self.drop
        require_number(drop, "drop")
        if isinstance(drop, str):
            each = sum(spec.parameters for spec in graph.block(0))
            count = max(0, math.ceil((graph.parameters - parameters(drop)) / each))
            count = math.ceil(count / period) * period
            if count == 0:
                message = f"the model has {graph.parameters:,} parameters already, no more than {drop}"
                raise RecipeError([Problem(message, "drop")])
            if count >= total:
                rest = graph.parameters - total * each
                message = f"{drop} needs {count} blocks of {each:,} less, there are {total}; {rest:,} lie outside them"
                raise RecipeError([Problem(message, "drop")])
            return count
        if isinstance(drop, float):
            count = max(1, round(drop * total / period)) * period
        else:
            assert drop is not None
            count = drop
        if count >= total:
            message = f"{count} of {total} blocks would go; leave at least one"
            raise RecipeError([Problem(message, "drop")])
        if count % period:
            message = (
                f"kinds of attention repeat every {period} blocks, so their number must fall by a multiple of that"
            )
            raise RecipeError([Problem(f"{message}, not by {count}", "drop")])
        return count

    def run(self, checkpoint: Checkpoint, graph: ModelGraph, bench: Workbench) -> Checkpoint:
        """Write the shorter checkpoint to ``bench.folder``."""
        target = self.preview(graph)
        bench.work.mkdir(parents=True, exist_ok=True)
        with compute_threads(bench.threads):
            changed: Mapping[str, Tensor] = {}
            note: Mapping[str, Any] = {}
            if self.needs_corpus:
                learn, held = split(bench.corpus, self.use)
                forward = Forward(checkpoint, graph)
                dropped = self._dropped(forward, learn, bench)
                bench.progress.say(f"{self.use}: blocks {', '.join(map(str, dropped))} go")
                if self.heal != "none":
                    changed, note = self._heal(forward, _without(graph, dropped), learn, held, bench)
            else:
                dropped = sorted(self.blocks or ())
            kept = Kept(tuple(_without(graph, dropped)))
            writer = CheckpointWriter(bench.folder, checkpoint, target.config)
            write_cut(writer, checkpoint, graph, target, kept, changed, {"dropped": list(dropped), **note})
        return writer.finish()

    def _dropped(self, forward: Forward, learn: Corpus, bench: Workbench) -> list[int]:
        if self.blocks is not None:
            return sorted(self.blocks)
        count, period = self._count(forward.graph), family_of(forward.graph.config).period(forward.graph.config)
        tokens = learn.tokens[: max(1, self.choice_tokens // learn.length)]
        if self.by == "influence":
            return by_influence(forward, tokens, count, period, bench.progress)
        if self.by == "angle":
            return by_angle(forward, tokens, count, bench.progress)
        return self._greedy(forward, tokens, count, period, bench)

    def _greedy(self, forward: Forward, tokens: Tensor, count: int, period: int, bench: Workbench) -> list[int]:
        """Rounds of greedy search; each is durable, so that a killed run goes on with the next."""
        path = bench.work / CHOICE
        dropped: list[int] = json.loads(path.read_bytes()) if path.exists() else []
        if len(dropped) < count:
            source = _source(forward, tokens, bench)
            while len(dropped) < count:
                run, kl = cheapest_run(forward, source, tokens, dropped, period, bench.progress)
                dropped += run
                bench.progress.say(f"{self.use}: without block {', '.join(map(str, run))} KL {kl:.3g}")
                write_atomic(path, json.dumps(dropped).encode())
        return sorted(dropped)

    def _heal(
        self, forward: Forward, stay: Sequence[int], learn: Corpus, held: Corpus, bench: Workbench
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """What healing changes, unless text that it has not seen says that it makes the model worse."""
        ways = {"best": ("gaps", "every"), "blocks": ("gaps", "every", "blocks")}.get(self.heal, (self.heal,))
        changes: dict[str, Mapping[str, Tensor]] = {"none": {}}
        for way in ways:
            if way == "blocks":
                fit = Fit(self.heal_passes, self.heal_rate, self.damping, self.heal_window)
                changes[way] = Blockwise(forward, learn, stay, fit, bench.work / way, bench.progress).run()
            else:
                changes[way] = healed(
                    forward, learn.tokens, stay, damping=self.damping, every=way == "every", progress=bench.progress
                )
        states = {way: changed_model(forward, held.tokens, stay, one, bench.progress) for way, one in changes.items()}
        kl = mean_kl(*_source(forward, held.tokens, bench), forward, states)
        best = min(kl.items(), key=lambda item: item[1])[0]
        said = ", ".join(f"{kl[way]:.3g} ({way})" for way in ways)
        if best == "none":
            bench.progress.say(
                f"{self.use}: kept the un-healed weights: KL {said} against {kl['none']:.3g} on held-out text"
            )
        else:
            bench.progress.say(f"{self.use}: healed: KL {said} against {kl['none']:.3g} without, on held-out text")
        return changes[best], {"gate": kl, "healed": best}


def _without(graph: ModelGraph, dropped: Sequence[int]) -> list[int]:
    return [index for index in range(graph.block_count) if index not in dropped]


def _require_equal_blocks(graph: ModelGraph) -> None:
    """The preview is exact only where blocks are stored alike: it does not know yet which ones go."""
    kinds = [[spec.encoding for spec in graph.block(index)] for index in range(graph.block_count)]
    for index, kind in enumerate(kinds):
        if kind != kinds[0]:
            message = f"block {index} is stored in other float types than block 0; name the blocks to remove"
            raise RecipeError([Problem(message, "drop")])


def _source(forward: Forward, tokens: Tensor, bench: Workbench) -> tuple[Forward, Tensor]:
    """The model that the recipe began with, and its final hidden states."""
    if bench.source.digest == forward.checkpoint.digest:
        source = forward
    else:
        source = Forward(bench.source, open_model(bench.source))
    return source, final_hidden(source.checkpoint, source.graph, tokens, bench.progress)
