"""The steps of a recipe in a row: what each makes of the graph before it, and whether it is done already.

Each key needs the output of the step before, so the chain is followed as far as it is cached. A step that chooses from
data is replaced by what it chooses as soon as its scores are there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llmpack.errors import Problem, RecipeError
from llmpack.models.graph import ModelGraph
from llmpack.pipeline.cache import Cache
from llmpack.pipeline.choosing import Choice, choose
from llmpack.pipeline.fitting import fitted
from llmpack.pipeline.keys import step_facts
from llmpack.pipeline.limits import Setting
from llmpack.pipeline.mixes import alternatives, known_best
from llmpack.pipeline.recipe import Recipe
from llmpack.pipeline.scoring import find_scores, score_facts
from llmpack.pipeline.toml_override import key_of
from llmpack.pipeline.toml_positions import TomlDocument
from llmpack.steps.quantize_auto import QuantizeAuto
from llmpack.steps.step import Processor, Step

STEP = "step"

State = Literal["cached", "unfinished", "to do"]


@dataclass(frozen=True)
class PlannedStep:
    """One step of the recipe.

    graph   what it will make
    state   "to do" also where it is not known yet, because a step before it has to run first
    made    digest of what it makes, if that is cached
    choice  what it chose, for a step that chooses; where that does not rest on scores yet, `step` is still as in the
            recipe, `graph` a stand-in of the size that was asked for, and `bounds` the smallest and the largest
    scores  facts of the scores that it chooses from, None where they are not known yet
    mixes   those that have to be built and compared before it can choose
    """

    step: Step
    graph: ModelGraph
    state: State
    key: str | None
    choice: Choice | None = None
    bounds: tuple[ModelGraph, ModelGraph] | None = None
    scores: dict[str, Any] | None = None
    mixes: tuple[Choice, ...] = ()
    made: str | None = None

    @property
    def open(self) -> bool:
        """Whether it has to choose before it can run."""
        return self.bounds is not None


@dataclass(frozen=True)
class Known:
    """What the chain starts from, by digest; None for what was never read.

    source  the model
    corpus  the calibration tokens
    """

    source: str | None
    corpus: str | None
    seed: int
    threads: int
    processor: Processor = "cpu"


def follow(
    recipe: Recipe, document: TomlDocument, graph: ModelGraph, known: Known, setting: Setting, cache: Cache
) -> tuple[PlannedStep, ...]:
    """Every step. Raises RecipeError for the first one that cannot work."""
    planned: list[PlannedStep] = []
    current = known.source
    for index, step in enumerate(recipe.step):
        try:
            if step.open_amount is not None:
                step = fitted(recipe.step[index:], graph, setting)
            one, current = _next(step, graph, current, known, setting, cache)
        except RecipeError as error:
            raise RecipeError([placed(p, document, ("step", index)) for p in error.problems]) from error
        planned.append(one)
        graph = one.graph
    return tuple(planned)


def _next(
    step: Step, graph: ModelGraph, current: str | None, known: Known, setting: Setting, cache: Cache
) -> tuple[PlannedStep, str | None]:
    """A step, and the digest of what it makes if that is cached."""
    choice: Choice | None = None
    wanted = None
    if isinstance(step, QuantizeAuto):
        wanted = _score_facts(step, graph, current, known)
        scores = find_scores(cache, wanted) if wanted is not None else None
        best, mixes = None, []
        if wanted is not None and scores is not None:
            mixes = alternatives(step, graph, scores, setting)
            best = known_best(mixes, wanted, cache)
        if best is None:
            choice = mixes[0] if mixes else choose(step, graph, scores, setting)
            bounds = step.bounds(graph)
            return PlannedStep(step, choice.graph, "to do", None, choice, bounds, wanted, tuple(mixes)), None
        choice, step = best, best.step
    graph_after = step.preview(graph)
    if current is None or known.source is None or (known.corpus is None and step.needs_corpus):
        return PlannedStep(step, graph_after, "to do", None, choice, scores=wanted), None
    facts = step_facts(
        step,
        source=current,
        origin=known.source,
        corpus=known.corpus,
        seed=known.seed,
        graph=graph_after,
        threads=known.threads,
        processor=known.processor,
    )
    entry = cache.find(STEP, facts)
    state: State = "cached" if entry is not None else "unfinished" if cache.unfinished(STEP, facts) else "to do"
    made = str(entry.result["digest"]) if entry is not None else None
    return PlannedStep(step, graph_after, state, cache.key(STEP, facts), choice, scores=wanted, made=made), made


def _score_facts(step: QuantizeAuto, graph: ModelGraph, current: str | None, known: Known) -> dict[str, Any] | None:
    if current is None or known.corpus is None:
        return None
    return score_facts(
        graph,
        source=current,
        corpus=known.corpus,
        tokens=step.tokens,
        seed=known.seed,
        threads=known.threads,
    )


def placed(problem: Problem, document: TomlDocument, base: tuple[str | int, ...] = ()) -> Problem:
    """A problem that names an option, with the place of that option in the file."""
    key = (*base, *(key_of(problem.path) if problem.path else ()))
    return document.problem(key, problem.message, rule=problem.rule)
