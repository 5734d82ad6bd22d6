"""quantize.gptq: round every number so that the ones rounded after it absorb its error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from llmpack.algorithms.drift import DriftSum, follow, shift, true_share
from llmpack.algorithms.gptq import Rounded, refine, relative_error, round_together
from llmpack.algorithms.hessian import Factor, damped, factorize
from llmpack.calibration.walk import Visit, resume_point, walk
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.writing import CheckpointWriter
from llmpack.encodings import ENCODINGS, encoding
from llmpack.encodings.encoding import GridEncoding, Quantized
from llmpack.errors import NumericalError, StepFailed
from llmpack.models.graph import ModelGraph, TensorSpec
from llmpack.progress import Progress
from llmpack.steps.blocks import (
    Treated,
    all_blocks_finished,
    at_block,
    compute_threads,
    packed_as,
    plain_encode,
    require_blocks,
    write_block,
    write_outside,
)
from llmpack.steps.quantize import Quantize
from llmpack.steps.step import Workbench

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")


class QuantizeGptq(Quantize):
    """Round numbers one column after the other, the columns that are left absorbing each error (GPTQ).

    Scales are fitted first, weighted by the mean squared input of each column, and then stay. The inputs of a block
    are those that it will really see: outputs of the blocks rounded before it.
    """

    version: ClassVar[int] = 2

    damping: float = Field(default=0.03, ge=0, le=10)
    """Share of the mean of the Hessian's diagonal that is added to it: more trusts the calibration text less. 0.03 is
    best on unseen text for some 30 thousand calibration tokens; with a quarter of them 0.1 is."""

    order: Literal["activation", "natural"] = "activation"
    """Which columns are rounded first: those with the largest inputs, or from left to right."""

    correction: float = Field(default=0.5, ge=0, le=1)
    """How far each matrix makes up for what rounding did to its inputs in the blocks before: 0 not at all, 1 all
    that it can predict. How much of that is true is tried on an eighth of the calibration sequences; with fewer than
    8 of them nothing is corrected. Needs the unchanged model's inputs too: one more forward pass of each block."""

    refine: int = Field(default=1, ge=0, le=16)
    """Rounds of refinement after rounding: scales are fitted again to the codes chosen, then each code takes its best
    value given all others. A round costs about as much as rounding itself."""

    on_failure: Literal["stop", "rtn"] = "stop"
    """What to do where a Hessian does not factor at any damping: stop, or round those matrices to nearest."""

    @property
    def needs_corpus(self) -> bool:
        """Always."""
        return True

    def encoding_problem(self, name: str) -> str | None:
        """Codes must stand for one column each."""
        kind = ENCODINGS.load(name)
        if issubclass(kind, GridEncoding) and kind.joint_columns != 1:
            return f"codes of {name} span {kind.joint_columns} columns; use quantize.rtn for them"
        return None

    def run(self, checkpoint: Checkpoint, graph: ModelGraph, bench: Workbench) -> Checkpoint:
        """Write the rounded checkpoint to ``bench.folder``."""
        target = self.preview(graph)
        writer = CheckpointWriter(bench.folder, checkpoint)
        with compute_threads(bench.threads):
            write_outside(writer, checkpoint, target, plain_encode, bench.progress)
            if not all_blocks_finished(writer, graph):
                for visit in self._visits(checkpoint, graph, bench, writer):
                    treated = self._block(visit, target, bench.progress)
                    write_block(writer, checkpoint, target, visit.index, treated)
        return writer.finish()

    def _visits(
        self, checkpoint: Checkpoint, graph: ModelGraph, bench: Workbench, writer: CheckpointWriter
    ) -> Iterator[Visit]:
        if bench.corpus is None:
            raise StepFailed("quantize.gptq learns from calibration text, and there is none; add [calibration]")
        reference = self.correction > 0
        start = resume_point(checkpoint, graph, bench.corpus, work=bench.work, reference=reference)
        require_blocks(writer, start)
        return walk(
            checkpoint,
            graph,
            bench.corpus,
            work=bench.work,
            start=start,
            progress=bench.progress,
            reference=reference,
        )

    def _block(self, visit: Visit, target: ModelGraph, progress: Progress) -> dict[str, Treated]:
        treated: dict[str, Treated] = {}
        moments = visit.moments() if self.correction else {}
        sums = {} if moments else visit.hessians()
        for inputs, specs in target.input_groups(visit.index).items():
            with at_block(self.use, visit.index, specs):
                both = moments.pop(inputs, None)
                H = both.own.mean() if both else sums.pop(inputs).mean()
                treated |= self._group(visit, specs, H, both.drift if both else None, progress)
        return treated

    def _group(
        self, visit: Visit, specs: Sequence[TensorSpec], H: Tensor, drift: DriftSum | None, progress: Progress
    ) -> dict[str, Treated]:
        """Matrices that read one input: those of one encoding are rounded together."""
        factor = self._factor(H, visit.index, specs, progress)
        treated: dict[str, Treated] = {}
        for name in dict.fromkeys(spec.encoding for spec in specs):
            chosen = [spec for spec in specs if spec.encoding == name]
            weights = [visit.weight(spec.name) for spec in chosen]
            kind = encoding(name)
            if not isinstance(kind, GridEncoding):
                for spec, W in zip(chosen, weights, strict=True):
                    treated[spec.name] = Treated(packed_as(spec, kind.encode(W)))
                    visit.replace(spec.name, kind.decode(treated[spec.name].packed.data, W.shape[1]))
                continue
            strengths = [0.0] * len(weights)
            if drift is not None and factor is not None:
                weights, strengths = _following(weights, drift, factor, self.correction)
            rounded = _round(weights, H, factor, kind)
            if factor is not None and self.refine:
                stiff = damped(H, factor.damping)
                rounded = [_refined(W, stiff, one, self.refine) for W, one in zip(weights, rounded, strict=True)]
            for spec, W, one, strength in zip(chosen, weights, rounded, strengths, strict=True):
                Q = one.quantized.decode()
                visit.replace(spec.name, Q)
                note = {"error": relative_error(W, Q, H), "clipped": one.clipped, **_of_factor(factor)}
                if drift is not None:
                    note["correction"] = strength
                treated[spec.name] = Treated(packed_as(spec, one.quantized.pack()), note)
        return treated

    def _factor(self, H: Tensor, block: int, specs: Sequence[TensorSpec], progress: Progress) -> Factor | None:
        try:
            factor = factorize(H, self.damping, self.order)
        except NumericalError as error:
            if self.on_failure == "stop":
                raise
            names = ", ".join(spec.name for spec in specs)
            progress.say(f"{names}: rounded to nearest, since {error}")
            return None
        if factor.raised:
            progress.say(f"block {block}, {specs[0].inputs}: damping raised to {factor.damping:g}")
        return factor


def _following(
    weights: Sequence[Tensor], drift: DriftSum, factor: Factor, correction: float
) -> tuple[list[Tensor], list[float]]:
    """Weights that make up for moved inputs, each as far as sequences kept out of the fit bear it out."""
    held = drift.held()
    shifts = torch.split(shift(torch.cat(list(weights)), drift.moved(), factor), [len(W) for W in weights])
    strengths = [correction * true_share(W, S, held) for W, S in zip(weights, shifts, strict=True)]
    return [follow(W, S, much) for W, S, much in zip(weights, shifts, strengths, strict=True)], strengths


def _round(weights: Sequence[Tensor], H: Tensor, factor: Factor | None, kind: GridEncoding) -> list[Rounded]:
    grids = [kind.fit(W, torch.diagonal(H)) for W in weights]
    if factor is None:
        rounded: list[Quantized] = [kind.round(W, grid) for W, grid in zip(weights, grids, strict=True)]
        return [Rounded(one, 0.0) for one in rounded]
    return round_together(weights, factor, grids, kind)


def _refined(W: Tensor, H: Tensor, start: Rounded, rounds: int) -> Rounded:
    """Scales and codes in turn, each the best for the others; the error only falls."""
    found = start.quantized
    for _ in range(rounds):
        grid = found.encoding.refit(found.codes, found.grid, W, H)
        found = refine(W, H, replace(found, grid=grid), sweeps=1)
    return Rounded(found, start.clipped)


def _of_factor(factor: Factor | None) -> Mapping[str, Any]:
    if factor is None:
        return {"fallback": "rtn"}
    note: dict[str, Any] = {"damping": factor.damping}
    if factor.raised:
        note["raised"] = list(factor.raised)
    if factor.dead:
        note["dead"] = factor.dead
    return note
