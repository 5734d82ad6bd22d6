"""quantize.gptq: round every number so that the ones rounded after it absorb its error."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llmpack.algorithms.drift import DriftSum, follow, shift, tried, true_share, unseen_error
from llmpack.algorithms.gptq import Rounded, objective, refine, round_together
from llmpack.algorithms.hessian import Factor, HessianSum, damping_level, factorize
from llmpack.allocator import give_back_memory
from llmpack.calibration.tuning import tune
from llmpack.calibration.walk import Moments, Visit, resume_point, walk
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.tensors import as_packed
from llmpack.checkpoint.writing import CheckpointWriter
from llmpack.encodings import ENCODINGS, encoding
from llmpack.encodings.encoding import Grid, GridEncoding
from llmpack.encodings.names import INT_NAMES, ORDERED_NAMES
from llmpack.errors import EnvironmentProblem, MissingExtra, NumericalError, Problem, RecipeError, StepFailed
from llmpack.models.graph import ModelGraph, TensorSpec
from llmpack.models.products import Products, has_bf16
from llmpack.profile import phase
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
from llmpack.steps.host_memory import Batch, Moment, Walk, walk_moments
from llmpack.steps.quantize import Quantize
from llmpack.steps.step import Processor, Workbench

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

NATIVE = {"correction", "refine", "tune", "tune_rate", "products", "on_failure", "requantize"}
"""Options that GPTQModel does not have."""


class QuantizeGptq(Quantize):
    """Round numbers one column after the other, the columns that are left absorbing each error (GPTQ).

    Scales are fitted first, weighted by the mean squared input of each column, and then stay. The inputs of a block
    are those that it will really see: outputs of the blocks rounded before it.
    """

    version: ClassVar[int] = 7

    engine: Literal["native", "gptqmodel"] = "native"
    """Who rounds: llmpack block by block, or GPTQModel (extra `gptq`), which makes int groups of the whole model at
    once: its memory is that of the model, and is not predicted; killed, it begins anew. It takes damping and order."""

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
    value given all others. A round costs about as much as rounding itself. Where correction keeps sequences out, these
    decide whether a matrix stays refined."""

    tune: int = Field(default=0, ge=0, le=10_000)
    """Steps of gradient descent on the scales and norms of each rounded block (codes stay), so that it puts out what
    the unchanged block does; a step takes a batch of calibration text. 0: none. An eighth of the sequences is kept out
    and decides whether the block stays as tuned; with fewer than 8 of them nothing is tuned."""

    tune_rate: float = Field(default=1e-3, gt=0, le=0.1)
    """Learning rate of the first of these steps, as a share of a scale; it falls to 0 along a line."""

    products: Literal["auto", "f32", "bf16"] = "auto"
    """How matrices are multiplied while calibration text runs through a block: in float32, or with operands rounded to
    bfloat16 and sums in float32. auto: bf16 on processors with instructions for it, which are several times faster (and
    float32 on a GPU); the divergence of the result was the same (demo model: 0.0826 nats both in int4_g64, 0.0464 and
    0.0465 in iq4_nl)."""

    on_failure: Literal["stop", "rtn"] = "stop"
    """What to do where a Hessian does not factor at any damping: stop, or round those matrices to nearest."""

    @model_validator(mode="after")
    def _known_to_the_engine(self) -> Self:
        if self.engine == "gptqmodel":
            native = sorted(self.model_fields_set & NATIVE)
            if native:
                raise ValueError(f'GPTQModel has no {", ".join(native)}; remove it, or set engine = "native"')
            if not 0 < self.damping < 1:
                raise ValueError("GPTQModel's damping lies between 0 and 1")
        return self

    @property
    def needs_corpus(self) -> bool:
        """Always."""
        return True

    @property
    def walks(self) -> bool:
        """Unless GPTQModel rounds."""
        return self.engine == "native"

    @property
    def gpu_problem(self) -> str | None:
        """Tuning, and operands of bfloat16, are of the processor."""
        if self.tune:
            return "tuning is done on the processor; set tune = 0"
        if self.products == "bf16":
            return 'products = "bf16" is about the processor; leave it out'
        return None

    @property
    def copies(self) -> int:
        """GPTQModel's folder, from which codes are taken over, lies beside the result."""
        return 2 if self.engine == "gptqmodel" else 1

    @property
    def packages(self) -> tuple[str, ...]:
        """GPTQModel, where it is the engine."""
        return ("gptqmodel",) if self.engine == "gptqmodel" else ()

    def preview(self, graph: ModelGraph) -> ModelGraph:
        """The graph with the encodings that the options ask for; MissingExtra for an engine that is not there."""
        target = super().preview(graph)
        if self.engine == "gptqmodel":
            kinds = sorted({spec.encoding for spec in target.tensors if spec.is_linear} & set(INT_NAMES))
            if len(kinds) != 1:
                text = f"GPTQModel rounds to int groups of one kind, not {', '.join(kinds) or self.encoding}"
                raise RecipeError([Problem(f'{text}; set encoding = "int4_g128" or the like', "encoding")])
            if importlib.util.find_spec("gptqmodel") is None:
                raise MissingExtra("gptqmodel", "gptq")
        return target

    def encoding_problem(self, name: str) -> str | None:
        """Codes must stand for one column each."""
        if self.engine == "gptqmodel" and self.order == "natural" and name in ORDERED_NAMES:
            return f'{name} is in activation order; set order = "activation"'
        kind = ENCODINGS.load(name)
        if issubclass(kind, GridEncoding) and kind.joint_columns != 1:
            return f"codes of {name} span {kind.joint_columns} columns; use quantize.rtn for them"
        return None

    def encoding_for(self, spec: TensorSpec) -> str:
        """How a tensor is to be stored; norms of blocks that may be tuned get room for it."""
        return "f32" if self.tunes(spec) else super().encoding_for(spec)

    def tunes(self, spec: TensorSpec) -> bool:
        """Whether a tensor is a norm that may move."""
        return self.tune > 0 and spec.part == "norm" and spec.block is not None

    def host_memory(self, graph: ModelGraph, batch: Batch | None) -> tuple[Moment, ...]:
        """One block, the second moments of its inputs, one of them factored; more with correction and refinement."""
        if batch is None or self.engine == "gptqmodel":
            return ()
        kind = Walk(factored=True, reference=self.correction > 0, refined=self.refine > 0, tuned=self.tune > 0)
        return tuple(walk_moments(graph, self.preview(graph), batch, kind))

    def run(self, checkpoint: Checkpoint, graph: ModelGraph, bench: Workbench) -> Checkpoint:
        """Write the rounded checkpoint to ``bench.folder``."""
        target = self.preview(graph)
        if self.engine == "gptqmodel":
            from llmpack.steps import gptqmodel  # not before it is needed, since a plan computes nothing

            activation = self.order == "activation"
            return gptqmodel.quantize(checkpoint, target, bench, damping=self.damping, activation=activation)
        writer = CheckpointWriter(bench.folder, checkpoint)
        with compute_threads(bench.threads):
            write_outside(writer, checkpoint, target, plain_encode, bench.progress)
            if not all_blocks_finished(writer, graph):
                for visit in self._visits(checkpoint, graph, bench, writer):
                    # a name for the rounded block would keep it beside the next one
                    write_block(writer, checkpoint, target, visit.index, *self._block(visit, target, bench.progress))
        return writer.finish()

    def _visits(
        self, checkpoint: Checkpoint, graph: ModelGraph, bench: Workbench, writer: CheckpointWriter
    ) -> Iterator[Visit]:
        if bench.corpus is None:
            raise StepFailed("quantize.gptq learns from calibration text, and there is none; add [calibration]")
        reference, kind = self.correction > 0 or self.tune > 0, self._products(bench.processor)
        start = resume_point(checkpoint, graph, bench.corpus, work=bench.work, reference=reference, kind=kind)
        require_blocks(writer, start)
        return walk(
            checkpoint,
            graph,
            bench.corpus,
            work=bench.work,
            start=start,
            progress=bench.progress,
            device=bench.processor,
            reference=reference,
            outputs=self.tune > 0,
            kind=kind,
        )

    def _products(self, processor: Processor) -> Products:
        """The way that is asked for. Raises EnvironmentProblem for bf16 on a processor that only imitates it."""
        if self.products != "bf16":
            return "bf16" if self.products == "auto" and processor == "cpu" and has_bf16() else "f32"
        if not has_bf16():
            raise EnvironmentProblem('this processor has no instructions for bfloat16; set products = "f32"')
        return "bf16"

    def _block(self, visit: Visit, target: ModelGraph, progress: Progress) -> tuple[dict[str, Treated], dict[str, Any]]:
        """The tensors of a block that change, and what is worth knowing about the block."""
        treated: dict[str, Treated] = {}
        if self.tune and not self.correction:
            visit.moments(())  # the unchanged model's outputs, which correction brings with it
        gathered: dict[str, Any] = dict(visit.moments() if self.correction else visit.hessians())
        for inputs, specs in target.input_groups(visit.index).items():
            with at_block(self.use, visit.index, specs):
                treated |= self._group(visit, specs, gathered.pop(inputs), progress)
            give_back_memory()
        asked = [one.note["refined"] for one in treated.values() if "refined" in one.note]
        note = {"refinement": {"kept": sum(asked), "of": len(asked)}} if asked else {}
        if self.tune:
            changed, found = self._tuned(visit, treated, progress)
            return {**treated, **changed}, {**note, **found}
        return treated, note

    def _tuned(
        self, visit: Visit, treated: Mapping[str, Treated], progress: Progress
    ) -> tuple[dict[str, Treated], dict[str, Any]]:
        rounded = {name: one.rounded for name, one in treated.items() if one.rounded is not None}
        tuned = tune(visit, rounded, steps=self.tune, rate=self.tune_rate, progress=progress)
        norms = {spec.name: tuned.norms.get(spec.name) for spec in visit.specs if self.tunes(spec)}
        stay = {name: Treated(as_packed(visit.weight(name) if W is None else W)) for name, W in norms.items()}
        moved = {
            name: replace(treated[name], packed=replace(treated[name].packed, data=one.pack()))
            for name, one in tuned.rounded.items()
        }
        give_back_memory()
        return {**stay, **moved}, {
            "tuning": {"kept": tuned.kept, "output_error": tuned.before, "tuned_output_error": tuned.after}
        }

    def _group(
        self, visit: Visit, specs: Sequence[TensorSpec], gathered: Moments | HessianSum, progress: Progress
    ) -> dict[str, Treated]:
        """Matrices that read one input: those of one encoding are rounded together. Nothing else holds `gathered`."""
        own, drift = (gathered.own, gathered.drift) if isinstance(gathered, Moments) else (gathered, None)
        H = own.mean()
        del own, gathered
        give_back_memory()  # what follows is the most that a block takes
        importance = torch.diagonal(H).clone()
        factor = self._factor(H, visit.index, specs, progress)
        weights, strengths = self._weights(visit, specs, drift, factor)
        unseen = None if drift is None else tried(drift.held())
        drift = None
        if factor is not None and self.refine:
            torch.diagonal(H).add_(damping_level(H, factor.damping))  # from here on H is damped
        treated: dict[str, Treated] = {}
        for name in dict.fromkeys(spec.encoding for spec in specs):
            chosen = [spec for spec in specs if spec.encoding == name]
            some, kind = [weights.pop(spec.name) for spec in chosen], encoding(name)
            if not isinstance(kind, GridEncoding):
                for spec, W in zip(chosen, some, strict=True):
                    treated[spec.name] = Treated(packed_as(spec, kind.encode(W)))
                    visit.replace(spec.name, kind.decode(treated[spec.name].packed.data, W.shape[1]))
                continue
            grids = _fit(some, importance, kind)
            rounded = _nearest(some, grids, kind, H) if factor is None else _round(some, grids, kind, factor)
            give_back_memory()
            for spec, W, one in zip(chosen, some, rounded, strict=True):
                best, won = (one, {}) if factor is None or not self.refine else self._better(W, H, one, factor, unseen)
                with phase("pack", numbers=spec.parameters):
                    visit.replace(spec.name, best.quantized.decode())
                    note = {"error": best.relative_error, "clipped": best.clipped, **_of_factor(factor), **won}
                    if spec.name in strengths:
                        note["correction"] = strengths[spec.name]
                    packed = packed_as(spec, best.quantized.pack())
                    treated[spec.name] = Treated(packed, note, best.quantized if self.tune else None)
        return treated

    def _better(
        self, W: Tensor, H: Tensor, plain: Rounded, factor: Factor, unseen: Tensor | None
    ) -> tuple[Rounded, dict[str, Any]]:
        """The refined matrix, or the plain one where that is nearer on inputs kept out of H; and which has won."""
        refined = _refined(W, H, plain, self.refine, factor)
        if unseen is None:
            return refined, {}
        with phase("compare", numbers=W.numel()):
            before, after = (unseen_error(W, one.quantized, unseen) for one in (plain, refined))
        won = after < before
        return refined if won else plain, {"refined": won, "unseen_ratio": after / before if before > 0 else 1.0}

    def _weights(
        self, visit: Visit, specs: Sequence[TensorSpec], drift: DriftSum | None, factor: Factor | None
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The matrices by name, made to follow what has moved; and how far, of those that could follow."""
        weights = {spec.name: visit.weight(spec.name) for spec in specs}
        if drift is None:
            return weights, {}
        names = [spec.name for spec in specs if isinstance(encoding(spec.encoding), GridEncoding)]
        if factor is None or not names:
            return weights, dict.fromkeys(names, 0.0)
        with phase("follow inputs", numbers=sum(weights[name].numel() for name in names)):
            moved, strengths = _following([weights[name] for name in names], drift, factor, self.correction)
        return weights | dict(zip(names, moved, strict=True)), dict(zip(names, strengths, strict=True))

    def _factor(self, H: Tensor, block: int, specs: Sequence[TensorSpec], progress: Progress) -> Factor | None:
        try:
            with phase("factorize", flops=len(H) ** 3 / 3):
                # refining needs H itself; without it the factor takes its memory
                factor = factorize(H, self.damping, self.order, torch.float32, overwrite=not self.refine)
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


def _fit(weights: Sequence[Tensor], importance: Tensor, kind: GridEncoding) -> list[Grid]:
    with phase("search scales", numbers=sum(W.numel() for W in weights)):
        return [kind.fit(W, importance) for W in weights]


def _round(weights: Sequence[Tensor], grids: Sequence[Grid], kind: GridEncoding, factor: Factor) -> list[Rounded]:
    numbers = sum(W.numel() for W in weights)
    with phase("round", numbers=numbers, flops=2.0 * numbers * len(factor.order)):
        return round_together(weights, factor, grids, kind)


def _nearest(weights: Sequence[Tensor], grids: Sequence[Grid], kind: GridEncoding, H: Tensor) -> list[Rounded]:
    """What is left where a Hessian does not factor."""
    rounded = []
    for W, grid in zip(weights, grids, strict=True):
        one = kind.round(W, grid)
        energy = objective(W, torch.zeros_like(W), H)
        rounded.append(Rounded(one, clipped=0.0, error=objective(W, one.decode(), H), energy=energy))
    return rounded


def _refined(W: Tensor, stiff: Tensor, start: Rounded, rounds: int, factor: Factor) -> Rounded:
    """Scales and codes in turn, each the best for the others under the damped Hessian; the error only falls."""
    found = start.quantized
    with phase("refine", numbers=rounds * W.numel()):
        for _ in range(rounds):
            grid = found.encoding.refit(found.codes, found.grid, W, stiff)
            found = refine(W, stiff, replace(found, grid=grid), sweeps=1)
        Q = found.decode()
        level = float(factor.added.min())  # what damping added to every column, the dead ones too
        error = objective(W, Q, stiff, torch.float32) - level * float((W - Q).square().sum(dtype=torch.float64))
    return replace(start, quantized=found, error=max(0.0, error))


def _of_factor(factor: Factor | None) -> Mapping[str, Any]:
    if factor is None:
        return {"fallback": "rtn"}
    note: dict[str, Any] = {"damping": factor.damping}
    if factor.raised:
        note["raised"] = list(factor.raised)
    if factor.dead:
        note["dead"] = factor.dead
    return note
