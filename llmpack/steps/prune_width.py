"""prune.width: narrower blocks, all of one shape, the matrices that read what is gone making up for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from llmpack.calibration.ablation import changed_model
from llmpack.calibration.corpus import Corpus
from llmpack.calibration.gate import mean_kl
from llmpack.calibration.healing import healed_towards
from llmpack.calibration.narrowing import group_width, narrow
from llmpack.calibration.walk import Visit, resume_point, walk
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.tensors import torch_dtype
from llmpack.checkpoint.writing import CheckpointWriter
from llmpack.errors import Problem, RecipeError
from llmpack.models import family_of, open_model
from llmpack.models.forward import Forward, final_hidden
from llmpack.models.graph import ModelGraph
from llmpack.models.surgery import Kept, resized, sliced
from llmpack.steps.amount import BUDGET, Amount, parameters, require_number
from llmpack.steps.blocks import all_blocks_finished, compute_threads, require_blocks, shard_name
from llmpack.steps.cutting import OnDominated, copy_checkpoint, promised, require_floats, split, write_cut
from llmpack.steps.hidden_channels import HiddenCut
from llmpack.steps.host_memory import Batch, Moment
from llmpack.steps.pruning_memory import fitting
from llmpack.steps.step import Step, Workbench

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

Way = tuple[Checkpoint, Mapping[str, "Tensor"]]
"""A narrower checkpoint, and other numbers for some of its tensors."""

AXES = {"hidden": "hidden", "heads": "groups", "ffn": "ffn"}
"""Options in the order in which they are carried out, and what `resized` calls them."""


class PruneWidth(Step):
    """Remove feed-forward channels, groups of heads or channels of the hidden states, in every block as many.

    What goes is what the rest can best make up for, by the second moments of calibration text, an eighth of which is
    held out: what makes up for it is kept only where it brings the model nearer to the source on that part.
    """

    version: ClassVar[int] = 2
    unkeyed: ClassVar[frozenset[str]] = frozenset({"on_dominated"})

    ffn: Amount | None = None
    """Feed-forward channels that go: a number, a share (0.25), the parameters to get down to ("90M"), or "budget": as
    few as `[budget]` allows."""

    heads: Amount | None = None
    """Groups of heads that go, each a key and value head with the query heads that share it."""

    hidden: Amount | None = None
    """Channels of the hidden states that go, from every matrix, norm and the embedding."""

    multiple_of: int = Field(default=256, ge=1, le=2**16)
    """What widths that are left must be a multiple of; k-quants need 256. Shares go to the nearest one."""

    compensate: bool = True
    """Let the matrices that read what is gone make up for it by least squares."""

    damping: float = Field(default=0.2, ge=0, le=10)
    """Share of its mean square that is added to each input of a matrix that makes up for what is gone: more trusts the
    calibration text less."""

    heal: bool = True
    """Then let what each block ends with take up, in closed form, what it can predict of how far the hidden states are
    from those of the wider model. Takes two streams of hidden states in memory."""

    heal_damping: float = Field(default=0.5, ge=0, le=10)
    """As `damping` of `prune.depth`, for `heal`."""

    on_dominated: OnDominated = "say"
    """As of `prune.depth`."""

    @property
    def copies(self) -> int:
        """Without hidden channels, narrow, narrow without what makes up for it, and the result."""
        return 4

    @property
    def needs_corpus(self) -> bool:
        """Always: what goes is chosen on it."""
        return True

    @property
    def open_amount(self) -> str | None:
        """The first option that is "budget"."""
        return next((name for name in AXES if getattr(self, name) == BUDGET), None)

    def amounts(self, graph: ModelGraph) -> Sequence[Step]:
        """Every width that `multiple_of` allows."""
        name = self.open_amount
        if name is None:
            return ()
        width, multiple = self._axis(graph, name)
        least = width - (width - 1) // multiple * multiple
        return [self.model_copy(update={name: gone}) for gone in range(least, width, multiple)]

    def preview(self, graph: ModelGraph) -> ModelGraph:
        """The narrower graph."""
        require_floats(graph)
        asked = [name for name in AXES if getattr(self, name) is not None]
        if not asked:
            raise RecipeError([Problem("say what goes: ffn, heads or hidden", "ffn")])
        targets = [name for name in asked if isinstance(getattr(self, name), str)]
        if len(targets) > 1:
            message = f"{' and '.join(targets)} cannot both get the model down to a size; give one of them as a number"
            raise RecipeError([Problem(message, targets[1])])
        for name in sorted(asked, key=lambda name: name in targets):
            graph = self._narrower(graph, name)
        return graph

    def host_memory(self, graph: ModelGraph, batch: Batch | None) -> tuple[Moment, ...]:
        """Second moments of what loses channels, factored; activations lie on disk."""
        asked = {"hidden": "ffn.in", "heads": "attention.out", "ffn": "ffn.out"}
        if batch is None:
            return ()
        moments = tuple(
            fitting(graph, inputs, f"choosing {name}", 0, batch)
            for name, inputs in asked.items()
            if getattr(self, name) is not None
        )
        return (*moments, fitting(graph, "ffn.out", "healing", 2, batch)) if self.heal else moments

    def _narrower(self, graph: ModelGraph, name: str) -> ModelGraph:
        width, multiple = self._axis(graph, name)
        require_number(getattr(self, name), name)

        def at(left: int) -> ModelGraph:
            sizes_left: dict[str, Any] = {AXES[name]: left}
            return promised(lambda: resized(graph, **sizes_left), name)

        return at(_left(getattr(self, name), width, multiple, name, lambda left: at(left).parameters))

    def _axis(self, graph: ModelGraph, name: str) -> tuple[int, int]:
        """How wide an axis is, and of what its width must be a multiple."""
        sizes = family_of(graph.config).sizes(graph.config)
        width = {"ffn": sizes.ffn, "heads": sizes.kv_heads, "hidden": sizes.hidden}[name]
        return width, 1 if name == "heads" else self.multiple_of

    def run(self, checkpoint: Checkpoint, graph: ModelGraph, bench: Workbench) -> Checkpoint:
        """Write the narrower checkpoint to ``bench.folder``."""
        target = self.preview(graph)
        learn, held = split(bench.corpus, self.use)
        bench.work.mkdir(parents=True, exist_ok=True)
        with compute_threads(bench.threads):
            narrowed, kept = self._narrowed(checkpoint, graph, target, learn, bench)
            ways: dict[str, Way] = {"none": (narrowed, {})}
            if self.compensate:
                plain = self._plain(checkpoint, graph, target, kept, narrowed, bench)
                ways = {"none": (plain, {}), "compensated": (narrowed, {})}
            if self.heal:
                ways["healed"] = narrowed, self._healed(narrowed, checkpoint, kept, learn, bench)
            if len(ways) == 1:
                return copy_checkpoint(narrowed, bench.folder, {}, {})
            best, note = self._judge(ways, held, bench)
            return copy_checkpoint(ways[best][0], bench.folder, ways[best][1], note)

    def _narrowed(
        self, checkpoint: Checkpoint, graph: ModelGraph, target: ModelGraph, learn: Corpus, bench: Workbench
    ) -> tuple[Checkpoint, Kept]:
        """The narrower checkpoint, in the work folder, and what stays of the model as it was."""
        hidden = None
        if self.hidden is not None:
            width = next(spec for spec in target.outside if spec.part == "embedding").shape[1]
            cut = HiddenCut(checkpoint, graph, learn, bench, self.damping, self.compensate)
            stays = cut.choose(width)
            config = promised(lambda: resized(graph, hidden=width), "hidden").config
            checkpoint = cut.write(stays, CheckpointWriter(bench.work / "narrower", checkpoint, config))
            graph, hidden = open_model(checkpoint), stays.numpy()
        if self.ffn is None and self.heads is None:
            return checkpoint, Kept(tuple(range(graph.block_count)), hidden=hidden)
        writer = CheckpointWriter(bench.work / "narrow", checkpoint, target.config)
        self._inside(checkpoint, graph, target, learn, writer, bench)
        notes = {index: writer.finished(shard_name(index)) or {} for index in range(graph.block_count)}
        ffn, groups = (
            {index: np.array(note[name]) for index, note in notes.items() if name in note} for name in ("ffn", "groups")
        )
        return writer.finish(), Kept(tuple(notes), ffn, groups, hidden)

    def _inside(
        self,
        checkpoint: Checkpoint,
        graph: ModelGraph,
        target: ModelGraph,
        learn: Corpus,
        writer: CheckpointWriter,
        bench: Workbench,
    ) -> None:
        """Write every block with fewer feed-forward channels and heads; the note of each says which stay."""
        sizes = family_of(graph.config).sizes(graph.config)
        work = bench.work / "inside"
        visits: Iterable[Visit] = ()
        if not all_blocks_finished(writer, graph):
            start = resume_point(checkpoint, graph, learn, work=work)
            require_blocks(writer, start)
            progress, device = bench.progress, bench.processor
            visits = walk(checkpoint, graph, learn, work=work, start=start, progress=progress, device=device)
        for visit in visits:
            kept, changed = self._block(visit, graph, target)
            if writer.finished(shard_name(visit.index)) is None:
                tensors = {
                    spec.name: changed[spec.name].to(torch_dtype(spec.encoding))
                    if spec.name in changed
                    else sliced(checkpoint.read(spec.name), graph[spec.name], sizes, kept)
                    for spec in target.block(visit.index)
                }
                writer.write(shard_name(visit.index), tensors, _positions(kept, visit.index))
                checkpoint.release(tensors)
        if writer.finished(shard_name(None)) is None:
            writer.write(shard_name(None), {spec.name: checkpoint.stored(spec.name) for spec in target.outside})

    def _block(self, visit: Visit, graph: ModelGraph, target: ModelGraph) -> tuple[Kept, dict[str, Tensor]]:
        before, after = (family_of(one.config).sizes(one.config) for one in (graph, target))
        kept: dict[str, dict[int, np.ndarray]] = {"groups": {}, "ffn": {}}
        changed = {}
        for option, name, inputs, unit, left in (
            ("heads", "groups", "attention.out", group_width(before), after.kv_heads),
            ("ffn", "ffn", "ffn.out", 1, after.ffn),
        ):
            if getattr(self, option) is not None:
                found = narrow(visit, inputs, unit, left, self.damping, compensate=self.compensate)
                kept[name][visit.index] = found.stays.numpy()
                (spec,) = (one for one in visit.specs if one.inputs == inputs)
                changed[spec.name] = found.W
        return Kept(tuple(range(graph.block_count)), kept["ffn"], kept["groups"]), changed

    def _plain(
        self,
        checkpoint: Checkpoint,
        graph: ModelGraph,
        target: ModelGraph,
        kept: Kept,
        narrowed: Checkpoint,
        bench: Workbench,
    ) -> Checkpoint:
        """The same channels and heads, with nothing made up for: only norms keep the size of what they let through."""
        norms = {spec.name: narrowed.read(spec.name) for spec in target.tensors if spec.part in ("norm", "embedding")}
        writer = CheckpointWriter(bench.work / "plain", checkpoint, target.config)
        write_cut(writer, checkpoint, graph, target, kept, norms if self.hidden is not None else {}, {})
        return writer.finish()

    def _healed(
        self, narrowed: Checkpoint, checkpoint: Checkpoint, kept: Kept, learn: Corpus, bench: Workbench
    ) -> dict[str, Tensor]:
        """Other numbers for what the blocks of the narrower checkpoint end with."""
        narrow, wide = (Forward(one, open_model(one)) for one in (narrowed, checkpoint))
        channels = None if kept.hidden is None else torch.from_numpy(np.asarray(kept.hidden))
        return healed_towards(
            narrow, wide, learn.tokens, channels=channels, damping=self.heal_damping, progress=bench.progress
        )

    def _judge(self, ways: Mapping[str, Way], held: Corpus, bench: Workbench) -> tuple[str, dict[str, Any]]:
        """Which of them is nearest to the source on text that none has seen."""
        source = Forward(bench.source, open_model(bench.source))
        wanted = final_hidden(bench.source, source.graph, held.tokens, bench.progress)
        kl: dict[str, float] = {}
        for name, (one, changed) in ways.items():
            forward = Forward(one, open_model(one))
            states = changed_model(forward, held.tokens, range(forward.graph.block_count), changed, bench.progress)
            kl |= mean_kl(source, wanted, forward, {name: states})
        best = min(kl, key=kl.__getitem__)
        said = ", ".join(f"{kl[way]:.3g} ({way})" for way in ways if way != "none")
        verdict = "kept the weights as they were" if best == "none" else best
        bench.progress.say(f"{self.use}: {verdict}: KL {said} against {kl['none']:.3g} without, on held-out text")
        return best, {"gate": kl, "healed": best}


def _positions(kept: Kept, block: int) -> dict[str, list[int]]:
    both = {"ffn": kept.ffn, "groups": kept.groups}
    return {name: found[block].tolist() for name, found in both.items() if block in found}


def _left(amount: Amount, width: int, multiple: int, name: str, size: Callable[[int], int]) -> int:
    """How wide an axis is once `amount` is gone. Raises RecipeError with the arithmetic where it cannot be.

    size  parameters of the model at a width
    """
    widest = (width - 1) // multiple * multiple
    if widest < 1:
        message = f"{width} {name} cannot get fewer and stay a multiple of {multiple}; lower `multiple_of`"
        raise RecipeError([Problem(message, name)])
    if isinstance(amount, str):
        return _fitting(amount, widest, multiple, name, size)
    if isinstance(amount, float):
        return min(widest, max(multiple, round(width * (1 - amount) / multiple) * multiple))
    left = width - amount
    if left < 1 or left % multiple:
        below, above = left // multiple * multiple, -(-left // multiple) * multiple
        fits = [str(width - one) for one in (above, below) if 0 < one < width]
        cure = f"take {' or '.join(fits)} away" if fits else f"take at most {width - multiple} away"
        message = f"{width} less {amount} is {left}, no multiple of {multiple}; {cure}, or set `multiple_of`"
        raise RecipeError([Problem(message, name)])
    return left


def _fitting(target: str, widest: int, multiple: int, name: str, size: Callable[[int], int]) -> int:
    """The widest that keeps the model within its parameters."""
    wanted = parameters(target)
    fits = next((left for left in range(widest, 0, -multiple) if size(left) <= wanted), None)
    if fits is None:
        message = f"even with {multiple} {name} left the model has {size(multiple):,} parameters, more than {target}"
        raise RecipeError([Problem(message, name)])
    if fits == widest and size(widest + multiple) <= wanted:
        message = f"the model has no more than {target} parameters already"
        raise RecipeError([Problem(message, name)])
    return fits
