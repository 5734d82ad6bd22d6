"""Scores: what each candidate encoding of each matrix is predicted to cost the model, as data.

Divergences are nats per token, predicted by the second-order model of `llmpack.algorithms.sensitivity`, scaled for each
part so that it gives the one divergence that was measured for that part (`llmpack.calibration.probing`). They add up
over matrices as long as they are small. Reading scores needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llmpack.encodings import ENCODINGS
from llmpack.encodings.encoding import GridEncoding
from llmpack.errors import StepFailed

FORMAT = 1
FILE = "scores.json"
ALWAYS = ("f16",)
"""Floats that are candidates too: what is left when nothing must be saved."""
DAMPING = 0.01
"""Share of the mean of a Hessian's diagonal that is added to it, whatever GPTQ will take: scores serve every choice."""
LEAST = 1e-9
"""Nats per token below which a divergence is rounding of the arithmetic, not of weights."""


@dataclass(frozen=True)
class TensorScore:
    """One matrix.

    energy         ``1/2 sum_o G_o W_o H W_o^T``: the scale on which errors of this matrix count, nats per token
    peak           largest number of its input over the root mean square; 0 for an embedding that is only looked up
    concentration  share of its input's energy in the strongest hundredth of its columns
    predicted      by encoding, divergence with error compensation (GPTQ), where the step has it
    nearest        by encoding, divergence when rounded to nearest
    """

    name: str
    part: str
    block: int | None
    shape: tuple[int, ...]
    energy: float
    peak: float
    concentration: float
    predicted: Mapping[str, float]
    nearest: Mapping[str, float]

    def joined(self, other: TensorScore) -> TensorScore:
        """A matrix that is used twice, as embedding and as head."""
        both = [name for name in self.predicted if name in other.predicted]
        return TensorScore(
            self.name,
            self.part,
            self.block,
            self.shape,
            self.energy + other.energy,
            max(self.peak, other.peak),
            max(self.concentration, other.concentration),
            {name: self.predicted[name] + other.predicted[name] for name in both},
            {name: self.nearest[name] + other.nearest[name] for name in both},
        )

    def scaled(self, factor: float) -> TensorScore:
        """The same with every divergence multiplied."""
        return replace(
            self,
            energy=factor * self.energy,
            predicted={name: factor * value for name, value in self.predicted.items()},
            nearest={name: factor * value for name, value in self.nearest.items()},
        )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TensorScore:
        """The inverse of `dataclasses.asdict`, after JSON."""
        return cls(**{**values, "shape": tuple(values["shape"])})


@dataclass(frozen=True)
class Probe:
    """One part, all of its matrices rounded to nearest in one encoding: what was measured, and what was predicted."""

    part: str
    encoding: str
    tokens: int
    measured: float
    predicted: float

    @property
    def factor(self) -> float:
        """What predictions for this part are multiplied by; 1 where nothing was lost that could be compared."""
        return self.measured / self.predicted if self.predicted > LEAST and self.measured > LEAST else 1.0


@dataclass(frozen=True)
class Scores:
    """All matrices of a model, in the order of its graph.

    tokens  of calibration text that they rest on
    probes  by which the predictions are scaled
    notes   what went otherwise than it should (JSON values)
    """

    tokens: int
    tensors: tuple[TensorScore, ...]
    probes: tuple[Probe, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def write(self, folder: Path) -> None:
        """As `FILE` in a folder."""
        (folder / FILE).write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Scores:
        """What `write` wrote. Raises StepFailed for another format."""
        document = json.loads((folder / FILE).read_text())
        if document.get("format") != FORMAT:
            raise StepFailed(f"{folder / FILE} has format {document.get('format')!r}; this llmpack reads {FORMAT}")
        tensors = tuple(TensorScore.of(values) for values in document["tensors"])
        probes = tuple(Probe(**values) for values in document["probes"])
        return cls(document["tokens"], tensors, probes, tuple(document["notes"]))

    def scaled(self, measured: Mapping[str, float], encoding: str, tokens: int) -> Scores:
        """Predictions scaled by the divergence that was measured for each part in one encoding."""
        probes = tuple(
            Probe(part, encoding, tokens, value, sum(t.nearest[encoding] for t in self.tensors if t.part == part))
            for part, value in measured.items()
        )
        factors = {probe.part: probe.factor for probe in probes}
        tensors = tuple(one.scaled(factors.get(one.part, 1.0)) for one in self.tensors)
        return replace(self, tensors=tensors, probes=probes)


def merged(tokens: int, order: Sequence[str], scores: Iterable[TensorScore], notes: Iterable[str]) -> Scores:
    """Scores in the order of names; those of one matrix are added."""
    found: dict[str, TensorScore] = {}
    for one in scores:
        found[one.name] = found[one.name].joined(one) if one.name in found else one
    return Scores(tokens, tuple(found[name] for name in order if name in found), notes=tuple(notes))


def scorable() -> tuple[str, ...]:
    """Every encoding that can be scored: those of GGUF whose codes stand for one number, and `ALWAYS`."""
    return tuple(
        name
        for name, kind in ENCODINGS.items()
        if kind.ggml_type is not None
        and (name in ALWAYS or (issubclass(kind, GridEncoding) and kind.joint_columns == 1))
    )
