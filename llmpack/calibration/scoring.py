"""Scoring: a forward and a backward pass, candidate encodings tried on some rows of every matrix, and probes.

What is found in each place is kept as a small file, so that a killed run goes on at the block where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from llmpack.algorithms.hessian import Factor, factorize
from llmpack.algorithms.sensitivity import (
    RowSample,
    compensated_divergence,
    concentration,
    leverage,
    predicted_divergence,
    sample_rows,
)
from llmpack.calibration.backward import EMBEDDING, HEAD, Backward, Gathered
from llmpack.calibration.corpus import Corpus
from llmpack.calibration.probing import ENCODING, TOKENS, Probes
from llmpack.calibration.scores import DAMPING, Scores, TensorScore, merged, scorable
from llmpack.checkpoint.atomic import write_atomic
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.tensors import decode
from llmpack.encodings import encoding
from llmpack.encodings.encoding import Encoding, GridEncoding
from llmpack.errors import NumericalError
from llmpack.models.graph import ModelGraph, TensorSpec
from llmpack.profile import phase
from llmpack.progress import QUIET, Progress

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

ROWS = 128
"""Most rows of a matrix of a block on which candidates are tried, all on the same ones. They are taken in proportion to
what they are expected to contribute, so what an encoding costs is known to some 4 %."""
OUTSIDE_ROWS = 2048
"""Most rows of the embedding and of the head."""
SLAB = 1 << 24
"""Numbers of such a matrix that are decoded at once."""


class Scoring:
    """Scores a checkpoint on a corpus.

    rows     most rows tried of a matrix, inside and outside the blocks
    seed     of the labels that are drawn from the model
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        graph: ModelGraph,
        corpus: Corpus,
        *,
        work: Path,
        seed: int = 0,
        rows: tuple[int, int] = (ROWS, OUTSIDE_ROWS),
        progress: Progress = QUIET,
    ) -> None:
        self._checkpoint, self._graph, self._progress = checkpoint, graph, progress
        self._rows, self._work = rows, work
        self._tokens, self._trial = corpus.tokens.numel(), first_sequences(corpus, TOKENS)
        self._backward = Backward(checkpoint, graph, corpus, work=work, seed=seed, progress=progress)
        self._encodings = scorable()
        self._notes: list[str] = []

    def run(self) -> Scores:
        """All scores. Raises NumericalError where the model's own passes are not finite."""
        places = self._backward.places
        missing = next((place for place in places if not self._path(place).exists()), None)
        if missing is not None:
            for gathered in self._backward.run(missing):
                self._notes = []
                scores = [asdict(one) for one in self._score(gathered)]
                document = {"scores": scores, "notes": self._notes}
                write_atomic(self._path(gathered.place), json.dumps(document).encode())
        found = [json.loads(self._path(place).read_text()) for place in places]
        scored = [TensorScore.of(values) for document in found for values in document["scores"]]
        notes = [note for document in found for note in document["notes"]]
        whole = merged(self._tokens, [spec.name for spec in self._graph.tensors], scored, notes)
        return whole.scaled(self._probes(), ENCODING, self._trial.tokens.numel())

    def _probes(self) -> dict[str, float]:
        path = self._path("probes")
        if not path.exists():
            measured = Probes(self._checkpoint, self._graph, self._trial.tokens, self._progress).run()
            write_atomic(path, json.dumps(measured).encode())
        return {part: float(value) for part, value in json.loads(path.read_text()).items()}

    def _path(self, place: int | str) -> Path:
        return self._work / f"scores-{place}.json"

    def _score(self, gathered: Gathered) -> Iterator[TensorScore]:
        if gathered.place == HEAD:
            (name,) = gathered.gradients
            yield self._of_head(self._graph[name], gathered)
        elif gathered.place == EMBEDDING:
            yield self._of_lookup(gathered)
        elif isinstance(gathered.place, int):
            specs = self._graph.input_groups(gathered.place)
            with self._progress.task(f"block {gathered.place}, candidates", sum(map(len, specs.values()))) as done:
                for inputs, group in specs.items():
                    factor = self._factor(gathered, inputs)
                    for spec in group:
                        yield self._of_linear(spec, gathered, factor)
                        done(1)

    def _factor(self, gathered: Gathered, inputs: str) -> Factor | None:
        try:
            return factorize(gathered.hessians[inputs], DAMPING)
        except NumericalError as error:
            self._notes.append(f"block {gathered.place}, {inputs}: scored as rounded to nearest, since {error}")
            return None

    def _of_linear(self, spec: TensorSpec, gathered: Gathered, factor: Factor | None) -> TensorScore:
        H, G = gathered.hessians[str(spec.inputs)], gathered.gradients[spec.name]
        W = self._checkpoint.read(spec.name).to(torch.float32)
        self._checkpoint.release([spec.name])
        diagonal = torch.diagonal(H)
        sample = sample_rows(G * (W.square() @ diagonal).double(), self._rows[0])
        weights, some = G[sample.rows] * sample.weights, W[sample.rows].contiguous()
        kept = None if factor is None else leverage(factor, H)
        predicted, nearest = {}, {}
        for name, dW in self._errors(spec, some, diagonal):
            nearest[name] = predicted_divergence(dW, H, weights)
            gptq = kept is not None and isinstance(encoding(name), GridEncoding)
            predicted[name] = compensated_divergence(dW, kept, weights) if gptq and kept is not None else nearest[name]
        energy = predicted_divergence(some, H, weights)
        peak = gathered.peaks[str(spec.inputs)] / max(float(diagonal.mean()) ** 0.5, 1e-30)
        return _score(spec, energy, peak, concentration(H), predicted, nearest)

    def _of_head(self, spec: TensorSpec, gathered: Gathered) -> TensorScore:
        H, G = gathered.hessians[HEAD], gathered.gradients[spec.name]
        diagonal = torch.diagonal(H)
        sizes = torch.cat([values.square() @ diagonal for values in self._slabs(spec)]).double()
        sample = sample_rows(G * sizes, self._rows[1])
        weights, some = G[sample.rows] * sample.weights, self._some_rows(spec, sample)
        nearest = {name: predicted_divergence(dW, H, weights) for name, dW in self._errors(spec, some, None)}
        peak = gathered.peaks[HEAD] / max(float(diagonal.mean()) ** 0.5, 1e-30)
        return _score(spec, predicted_divergence(some, H, weights), peak, concentration(H), nearest, nearest)

    def _of_lookup(self, gathered: Gathered) -> TensorScore:
        spec = next(spec for spec in self._graph.outside if spec.part == "embedding")
        assert gathered.tokens is not None
        assert gathered.squares is not None
        every = RowSample(gathered.tokens, torch.ones(len(gathered.tokens)))
        sizes = (gathered.squares * self._some_rows(spec, every).double().square()).sum(1)
        among = sample_rows(sizes, self._rows[1])
        sample = RowSample(gathered.tokens[among.rows], among.weights)
        squares = gathered.squares[among.rows] * among.weights[:, None]

        def cost(dW: Tensor) -> float:
            return float(0.5 * (squares * dW.double().square()).sum())

        some = self._some_rows(spec, sample)
        nearest = {name: cost(dW) for name, dW in self._errors(spec, some, None)}
        return _score(spec, cost(some), 0.0, 0.0, nearest, nearest)

    def _errors(self, spec: TensorSpec, W: Tensor, importance: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        """Each candidate's error of rounding these rows to nearest; encodings that do not fit the row are none."""
        for name in self._encodings:
            if encoding(name).problem(spec.shape[1]) is not None:
                continue
            try:
                with phase("round to candidates", numbers=W.numel()):
                    error = _rounding_error(encoding(name), W, importance)
            except ValueError as problem:
                self._notes.append(f"{spec.name}: {name} is no candidate, since {problem}")
            else:
                yield name, error

    def _slabs(self, spec: TensorSpec) -> Iterator[Tensor]:
        step = max(1, SLAB // spec.shape[1])
        for start in range(0, spec.shape[0], step):
            packed = self._checkpoint.packed(spec.name)[start : start + step]
            yield self._decoded(spec, packed)
        self._checkpoint.release([spec.name])

    def _some_rows(self, spec: TensorSpec, sample: RowSample) -> Tensor:
        values = self._decoded(spec, self._checkpoint.packed(spec.name)[sample.rows.numpy()])
        self._checkpoint.release([spec.name])
        return values

    def _decoded(self, spec: TensorSpec, packed: np.ndarray) -> Tensor:
        return decode(packed, self._checkpoint.tensors[spec.name].encoding, (len(packed), spec.shape[1])).float()


def _rounding_error(kind: Encoding, W: Tensor, importance: Tensor | None) -> Tensor:
    if not len(W):
        return W
    if isinstance(kind, GridEncoding):
        return kind.round(W, kind.fit(W, importance)).decode() - W
    return kind.decode(kind.encode(W), W.shape[1]) - W


def _score(
    spec: TensorSpec,
    energy: float,
    peak: float,
    strongest: float,
    predicted: dict[str, float],
    nearest: dict[str, float],
) -> TensorScore:
    return TensorScore(spec.name, spec.part, spec.block, spec.shape, energy, peak, strongest, predicted, nearest)


def first_sequences(corpus: Corpus, tokens: int) -> Corpus:
    """The first sequences of a corpus, at most `tokens` in all and at least one."""
    count = max(1, min(len(corpus.tokens), tokens // corpus.length))
    return corpus if count == len(corpus.tokens) else Corpus.of(corpus.tokens[:count])
