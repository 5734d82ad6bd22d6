"""What quantize.auto chooses: the mix of encodings of least predicted divergence that keeps its target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmpack.algorithms.allocation import Item, allocate, frontier
from llmpack.calibration.scores import Scores
from llmpack.encodings import ENCODINGS
from llmpack.errors import Problem, RecipeError
from llmpack.formats.gguf import FLOATS
from llmpack.models.graph import ModelGraph, TensorSpec
from llmpack.pipeline.limits import Limit, Setting, file_size, limits_of, most_bytes
from llmpack.steps.quantize_auto import QuantizeAuto, QuantizeMix, Target

MORE = 10_000_000
"""Bytes of which a choice tells what they would buy."""
POINTS = 65
"""Points of a curve that are kept."""
FINE = 1 << 40
"""Parts into which a limit is divided where several are weighed against each other."""


@dataclass(frozen=True)
class Choice:
    """A mix of encodings, and why.

    step       quantize.auto with this mix
    graph      what it makes
    scored     whether it rests on scores; else on bits per weight alone, as a stand-in until they are there
    predicted  divergence in nats per token, by the second-order model; not measured
    limits     what was asked for, how much of it is used, and of how much
    nbytes     of the model file
    between    least and most that `nbytes` can be whatever the scores say
    curve      (bytes of the model file, least predicted divergence) from the smallest mix to the best
    more       what `MORE` bytes beyond those of this mix would make of `predicted`
    compared   (predicted, measured) divergence of every mix that was built to be compared, this one's first
    """

    step: QuantizeMix
    graph: ModelGraph
    scored: bool
    predicted: float
    limits: tuple[tuple[str, int, int], ...]
    nbytes: int
    between: tuple[int, int]
    curve: tuple[tuple[int, float], ...]
    more: float
    compared: tuple[tuple[float, float], ...] = ()

    def by_part(self) -> dict[str, dict[str, int]]:
        """How many tensors of each part have which encoding."""
        found: dict[str, dict[str, int]] = {}
        for name, chosen in self.step.encodings.items():
            counts = found.setdefault(self.graph[name].part, {})
            counts[chosen] = counts.get(chosen, 0) + 1
        return found

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "predicted_kl": self.predicted,
            "predicted_by": "second-order model, not measured",
            "model_bytes": self.nbytes,
            "limits": [{"limit": words, "used": used, "of": bound} for words, used, bound in self.limits],
            "encodings": dict(self.step.encodings),
            "more": {"bytes": MORE, "predicted_kl": self.more},
            "compared": [{"predicted_kl": guess, "measured_kl": found} for guess, found in self.compared],
            "curve": [{"model_bytes": nbytes, "predicted_kl": cost} for nbytes, cost in self.curve],
        }


def choose(
    step: QuantizeAuto, graph: ModelGraph, scores: Scores | None, setting: Setting, emphasis: str = ""
) -> Choice:
    """The mix of least predicted divergence that keeps the step's target.

    emphasis  parts whose names start like this count twice while the mix is sought

    Without scores a stand-in of the same size: matrices of like bits. Raises RecipeError where nothing fits.
    """
    lower, upper = step.bounds(graph)
    problem = _Problem(step, graph, scores, setting)
    least, most = ([bound[spec.name] for spec in problem.specs] for bound in (lower, upper))
    file = file_size(setting, lower, least)
    limits = limits_of(Target.parse(step.target), setting, lower, least, file)
    mix = problem.solve(limits, emphasis)
    chosen = problem.with_encodings(mix)
    nbytes = file.used(chosen)
    made = step.chosen({spec.name: spec.encoding for spec in chosen})
    highest = min([file.used(most), *(most_bytes(limit, file, most) for limit in limits)])
    richer = problem.solve([replace(file, bound=nbytes + MORE)])
    return Choice(
        step=made,
        graph=made.preview(graph),
        scored=scores is not None,
        predicted=problem.cost(mix),
        limits=tuple((f"{one.words}, in {one.unit}", one.used(chosen), one.bound) for one in limits),
        nbytes=nbytes,
        between=(file.used(least), highest),
        curve=tuple(_thinned([(file.fixed + size, cost) for size, cost in frontier(problem.items(file))])),
        more=problem.cost(richer),
    )


class _Problem:
    """The tensors that are chosen for, their options and the cost of each."""

    def __init__(self, step: QuantizeAuto, graph: ModelGraph, scores: Scores | None, setting: Setting) -> None:
        known = {one.name: one.predicted for one in scores.tensors} if scores is not None else None
        self.specs = [spec for spec in graph.tensors if step.options_for(spec)]
        stored = setting.file_format.floats
        floats = {name for name in FLOATS if stored is not None and name != stored}
        self.options: list[list[TensorSpec]] = []
        self.costs: list[list[float]] = []
        for spec in self.specs:
            cost = _by_bits(spec, step.options_for(spec)) if known is None else known[spec.name]
            names = [name for name in step.options_for(spec) if name in cost and name not in floats]
            if not names:
                text = f"{spec.name} can have none of the candidates in a bundle of float = {stored!r}"
                raise RecipeError([Problem(text, "candidates")])
            self.options.append([replace(spec, encoding=name) for name in names])
            self.costs.append([cost[name] for name in names])

    def with_encodings(self, mix: Sequence[int]) -> list[TensorSpec]:
        """The tensors as a mix has them."""
        return [options[at] for options, at in zip(self.options, mix, strict=True)]

    def cost(self, mix: Sequence[int]) -> float:
        """Predicted divergence of a mix."""
        return sum(costs[at] for costs, at in zip(self.costs, mix, strict=True))

    def items(self, limit: Limit, emphasis: str = "") -> list[Item]:
        """Options with what they take of one limit."""
        weighed = self._weighed(emphasis)
        return [
            Item(tuple(map(limit.cost, options)), costs) for options, costs in zip(self.options, weighed, strict=True)
        ]

    def _weighed(self, emphasis: str) -> list[tuple[float, ...]]:
        doubled = [bool(emphasis) and spec.part.startswith(emphasis) for spec in self.specs]
        return [tuple(2 * c if twice else c for c in costs) for costs, twice in zip(self.costs, doubled, strict=True)]

    def solve(self, limits: Sequence[Limit], emphasis: str = "") -> tuple[int, ...]:
        """The best mix. Raises RecipeError where nothing keeps every limit.

        A mix that is best under one limit and keeps the others is best under all. Where none is, each option is counted
        by the limit of which it takes most, which keeps all of them and may leave a little of each.
        """
        self._require_room(limits)
        found = []
        for limit in limits:
            mix = allocate(self.items(limit, emphasis), limit.bound - limit.fixed)
            if all(one.used(self.with_encodings(mix)) <= one.bound for one in limits):
                found.append(mix)
        if not found:
            found.append(self._under_all(limits, emphasis))
        weighed = self._weighed(emphasis)
        return min(found, key=lambda mix: sum(costs[at] for costs, at in zip(weighed, mix, strict=True)))

    def _under_all(self, limits: Sequence[Limit], emphasis: str) -> tuple[int, ...]:
        shares = [
            [[limit.cost(option) / (limit.bound - limit.fixed) for limit in limits] for option in options]
            for options in self.options
        ]
        items = [
            Item(tuple(1 + int(FINE * max(share)) for share in options), costs)
            for options, costs in zip(shares, self._weighed(emphasis), strict=True)
        ]
        try:
            return allocate(items, FINE)
        except ValueError as none:
            named = "; ".join(f"{limit.words}: {limit.bound}" for limit in limits)
            text = f"no mix was found that keeps every limit at once ({named}); raise one of them"
            raise RecipeError([Problem(text, "target")]) from none

    def _require_room(self, limits: Sequence[Limit]) -> None:
        problems = []
        for limit in limits:
            least = limit.fixed + sum(min(item.sizes) for item in self.items(limit))
            if least > limit.bound:
                text = f"{limit.words} allows {limit.bound:,} {limit.unit}, and the smallest mix takes {least:,}"
                problems.append(Problem(f"{text}; raise it, or allow smaller encodings", "target"))
        if problems:
            raise RecipeError(problems)


def _by_bits(spec: TensorSpec, names: Sequence[str]) -> Mapping[str, float]:
    """Costs as if every number counted the same: squared errors fall by four with each bit."""
    return {name: spec.parameters * 4.0 ** -ENCODINGS.load(name)().bits_per_weight for name in names}


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most about `POINTS` points at equal steps of bytes, the ends among them."""
    low, high = points[0][0], points[-1][0]
    found: dict[int, tuple[int, float]] = {}
    for nbytes, cost in points:  # the best point of each step stays
        found[(nbytes - low) * (POINTS - 1) // max(1, high - low)] = (nbytes, cost)
    return list(dict.fromkeys((points[0], *found.values())))
