"""quantize.auto: the encoding of every matrix chosen so that a given size costs the predictions least."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, ValidationError, WithJsonSchema

from llmpack.calibration.scores import scorable
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.encodings import ENCODINGS
from llmpack.errors import Problem, RecipeError, StepFailed
from llmpack.models.graph import ModelGraph, TensorSpec
from llmpack.registry import suggestion
from llmpack.steps.host_memory import Batch, Moment
from llmpack.steps.quantize import FLOATS, EncodingName, Quantize
from llmpack.steps.quantize_gptq import QuantizeGptq
from llmpack.steps.step import Step, Workbench
from llmpack.units import parse_size

_BITS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*bpw\s*\Z")


@dataclass(frozen=True)
class Target:
    """How large the model may become.

    kind   "bits" of storage per number over all tensors, "bytes" of the model file, or the "budget" of the recipe
    value  bits or bytes; 0 for the budget
    """

    kind: Literal["bits", "bytes", "budget"]
    value: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read ``"3.9 bpw"``, ``"105 MB"`` or ``"budget"``. Raises ValueError for anything else."""
        if text.strip() == "budget":
            return cls("budget")
        match = _BITS.match(text)
        if match:
            return cls("bits", float(match[1]))
        try:
            return cls("bytes", parse_size(text))
        except ValueError as error:
            raise ValueError(f'{error}; a target is bits per weight ("3.9 bpw"), a size, or "budget"') from error


def _readable(text: str) -> str:
    Target.parse(text)
    return text


def _scorable(names: tuple[str, ...]) -> tuple[str, ...]:
    known = scorable()
    for name in names:
        if name not in known:
            raise ValueError(f"{name} cannot be chosen by score{suggestion(name, known)}")
    return names


def _of_gptq(options: dict[str, Any]) -> dict[str, Any]:
    """The options, checked as quantize.gptq checks them. Raises ValueError with everything that is wrong."""
    known = gptq_options()
    wrong = [f"unknown key `{name}`{suggestion(name, list(known))}" for name in options if name not in known]
    try:
        QuantizeGptq.model_validate({"use": "quantize.gptq", **{k: v for k, v in options.items() if k in known}})
    except ValidationError as error:
        wrong += [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
    if wrong:
        raise ValueError("; ".join(wrong))
    return options


def gptq_options() -> dict[str, Any]:
    """The options of quantize.gptq that say how it rounds, not to what, with their defaults."""
    whole = QuantizeGptq(use="quantize.gptq").model_dump(mode="json")
    return {name: value for name, value in whole.items() if name not in Quantize.model_fields and name != "engine"}


TargetText = Annotated[
    str,
    AfterValidator(_readable),
    WithJsonSchema({"type": "string", "examples": ["3.9 bpw", "105 MB", "budget"]}),
]
Names = Annotated[tuple[EncodingName, ...], AfterValidator(_scorable)]


class QuantizeAuto(Step):
    """Choose the encoding of every matrix, embedding and head included, and round with GPTQ.

    Every candidate encoding of every matrix is scored by the divergence that it is predicted to cost (one forward and
    one backward pass over calibration text); the mix of least predicted divergence that fits the target is chosen,
    exactly. Until scores are there, a plan gives bounds.
    """

    target: TargetText = "budget"
    """Bits per weight (`"3.9 bpw"`), the size of the model file (`"105 MB"`), or `"budget"`: what `[budget]` leaves for
    the weights by its limits of disk, memory and decode, after the KV cache and all buffers."""

    candidates: Names = ()
    """Encodings to choose from; by default all whose rows fit."""

    forbid: Names = ()
    """Encodings that are not chosen."""

    tokens: int = Field(default=8192, ge=1, le=2**31)
    """Tokens of the calibration text on which scores rest."""

    mixes: int = Field(default=1, ge=1, le=4)
    """How many mixes are built, of which the one of least measured divergence is kept: the best by prediction, and
    others for which errors of attention, of feed-forward or of the embedding count twice. Each costs a whole
    quantization; 1 trusts the prediction. They are measured on text that follows the calibration text in its sources
    and that no step has seen."""

    gptq: Annotated[dict[str, Any], AfterValidator(_of_gptq)] = Field(default_factory=dict)
    """How to round: options of `quantize.gptq` such as `{ damping = 0.02 }`."""

    @property
    def needs_corpus(self) -> bool:
        """Always."""
        return True

    @property
    def walks(self) -> bool:
        """As quantize.gptq, by which it rounds."""
        return True

    @property
    def gpu_problem(self) -> str | None:
        """That of the options of quantize.gptq."""
        return self.chosen({}).gpu_problem

    @property
    def allowed(self) -> tuple[str, ...]:
        """What may be chosen, in the order of the table of encodings."""
        named = self.candidates or scorable()
        return tuple(name for name in scorable() if name in named and name not in self.forbid)

    def options_for(self, spec: TensorSpec) -> tuple[str, ...]:
        """Encodings that a tensor may get; none for one that stays as it is."""
        if not (spec.is_linear or spec.part in ("embedding", "output")):
            return ()
        return tuple(name for name in self.allowed if ENCODINGS.load(name)().problem(spec.shape[-1]) is None)

    def bounds(self, graph: ModelGraph) -> tuple[ModelGraph, ModelGraph]:
        """The smallest and the largest graph that it may make. Raises RecipeError where a tensor has no candidate."""
        self._require_candidates(graph)

        def end(spec: TensorSpec, first: bool) -> str:
            names = self.options_for(spec)
            sizes = {name: ENCODINGS.load(name)().nbytes(spec.shape) for name in names}
            chooser = min if first else max
            return chooser(names, key=sizes.__getitem__) if names else spec.encoding

        return graph.with_encodings(lambda s: end(s, True)), graph.with_encodings(lambda s: end(s, False))

    def _require_candidates(self, graph: ModelGraph) -> None:
        problems = []
        for spec in graph.tensors:
            if not (spec.is_linear or spec.part in ("embedding", "output")):
                continue
            if spec.encoding not in FLOATS:
                text = f"{spec.name} is stored as {spec.encoding} already; rounding twice loses more than it saves"
                problems.append(Problem(f"{text}, remove one of the steps", "use"))
            elif not self.options_for(spec):
                fitting = [name for name in scorable() if ENCODINGS.load(name)().problem(spec.shape[-1]) is None]
                text = f"{spec.name} has rows of {spec.shape[-1]}, which no candidate fits"
                problems.append(Problem(f"{text}; allow one of {', '.join(fitting)}", "candidates"))
        if problems:
            raise RecipeError(problems)

    def preview(self, graph: ModelGraph) -> ModelGraph:
        """The largest graph that it may make: what it does make is known once its choice is (see `chosen`)."""
        return self.bounds(graph)[1]

    def host_memory(self, graph: ModelGraph, batch: Batch | None) -> tuple[Moment, ...]:
        """What rounding to the largest candidates takes."""
        largest = self.bounds(graph)[1]
        return self.chosen({s.name: s.encoding for s in largest.tensors if self.options_for(s)}).host_memory(
            graph, batch
        )

    def chosen(self, encodings: Mapping[str, str]) -> QuantizeMix:
        """The step with its choice made: the encoding of each tensor by name."""
        return QuantizeMix(use=self.use, encodings=dict(encodings), gptq={**gptq_options(), **self.gptq})

    def run(self, checkpoint: Checkpoint, graph: ModelGraph, bench: Workbench) -> Checkpoint:
        """Raises StepFailed: the plan makes the choice, and runs the step that `chosen` gives."""
        raise StepFailed("quantize.auto was asked to run before its encodings were chosen")


class QuantizeMix(Step):
    """`quantize.auto` once it has chosen. Not for recipes: the plan makes it from scores."""

    version: ClassVar[int] = QuantizeGptq.version

    encodings: dict[str, str]
    """The encoding of each tensor by name; tensors that are not named stay as they are."""

    gptq: dict[str, Any]
    """All options of `quantize.gptq` but the encodings."""

    @property
    def needs_corpus(self) -> bool:
        """Always."""
        return True

    @property
    def walks(self) -> bool:
        """As quantize.gptq."""
        return self._rounding.walks

    @property
    def gpu_problem(self) -> str | None:
        """That of the options of quantize.gptq."""
        return self._rounding.gpu_problem

    @property
    def _rounding(self) -> _Rounding:
        return _Rounding(use=self.use, mix=self.encodings, **self.gptq)

    def preview(self, graph: ModelGraph) -> ModelGraph:
        """The graph with the encodings that were chosen."""
        return self._rounding.preview(graph)

    def host_memory(self, graph: ModelGraph, batch: Batch | None) -> tuple[Moment, ...]:
        """As of quantize.gptq."""
        return self._rounding.host_memory(graph, batch)

    def run(self, checkpoint: Checkpoint, graph: ModelGraph, bench: Workbench) -> Checkpoint:
        """Round with GPTQ, as quantize.gptq does."""
        return self._rounding.run(checkpoint, graph, bench)


class _Rounding(QuantizeGptq):
    """quantize.gptq with an encoding for each tensor by name."""

    mix: dict[str, str]

    def encoding_for(self, spec: TensorSpec) -> str:
        """How a tensor is to be stored."""
        return self.mix.get(spec.name, "f32" if self.tunes(spec) else spec.encoding)
