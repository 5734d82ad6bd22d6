"""Stage 4, run: the steps, each found in the cache or done now, block by block, so that a killed build goes on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmpack.calibration.corpus import Corpus
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.errors import BudgetMissed, StepFailed
from llmpack.models import open_model
from llmpack.models.graph import ModelGraph
from llmpack.pipeline.alternative import DIVERGENCE, compared_after, divergence_facts, judged, source_scores
from llmpack.pipeline.cache import Slot
from llmpack.pipeline.chain import STEP, Known, PlannedStep
from llmpack.pipeline.choosing import Choice
from llmpack.pipeline.corpora import require_texts
from llmpack.pipeline.host_memory import require_free_memory
from llmpack.pipeline.keys import step_facts
from llmpack.pipeline.memory_cap import capped_memory
from llmpack.pipeline.mixes import TOKENS, compare
from llmpack.pipeline.plan import require_disk, seed_of
from llmpack.pipeline.scoring import gather_scores, score_facts
from llmpack.pipeline.stages.planning import plan
from llmpack.pipeline.state import Build, StepRecord
from llmpack.steps.blocks import compute_threads, noted
from llmpack.steps.quantize_auto import QuantizeAuto
from llmpack.steps.step import Workbench

if TYPE_CHECKING:
    from torch import Tensor


def run(build: Build) -> Build:
    """Fill in `source`, `corpora`, `checkpoint` and `steps`.

    Raises BudgetMissed if the plan cannot fit, EnvironmentProblem for lack of disk or memory, RecipeError for texts
    that are too short or of which one holds the other, StepFailed and its kinds.
    """
    _require_hope(build)
    texts = require_texts(build.calibration, build.evaluation, build.cache)
    source = build.origin.digest(build.cache)
    corpus = _Calibration(build)
    checkpoint, digest, graph = build.origin.checkpoint, source, build.origin.graph
    records: list[StepRecord] = []
    for index in range(len(build.plan.steps)):
        before = _Before(checkpoint, graph, digest, source, corpus)
        if build.plan.steps[index].open:
            build = _choose(build, index, before)
        checkpoint, record = _made(build, build.plan.steps[index], before, f"step {index}")
        digest, graph = checkpoint.digest, build.plan.steps[index].graph
        records.append(record)
        if index in compared_after(build.plan.steps):
            start = _Before(build.origin.checkpoint, build.origin.graph, source, source, corpus)
            build = _weighed(build, start, checkpoint)
    return replace(build, source=source, corpora=texts, checkpoint=checkpoint, steps=tuple(records))


def _require_hope(build: Build) -> None:
    if build.plan.misses:
        raise BudgetMissed("the plan misses the budget before anything is built", *build.plan.verdicts)
    require_disk(build.plan)
    require_free_memory(build.plan.host_memory, build.recipe)


@dataclass(frozen=True)
class _Before:
    """What a step starts from; `digest` is that of the checkpoint, `source` that of the model."""

    checkpoint: Checkpoint
    graph: ModelGraph
    digest: str
    source: str
    corpus: _Calibration


def _made(build: Build, planned: PlannedStep, before: _Before, name: str) -> tuple[Checkpoint, StepRecord]:
    """What a step makes, found or made now."""
    facts = step_facts(
        planned.step,
        source=before.digest,
        origin=before.source,
        corpus=before.corpus.digest if planned.step.needs_corpus else None,
        seed=seed_of(build.recipe),
        graph=planned.graph,
        threads=build.plan.threads,
        processor=build.recipe.build.processor,
    )
    with build.cache.claim(STEP, facts, f"{name} {planned.step.use}") as slot:
        cached = slot.entry is not None
        if cached:
            checkpoint = Checkpoint.reopen(slot.content)
        else:
            checkpoint = _run_step(build, planned, before.graph, before.checkpoint, slot, before.corpus)
        found = noted(checkpoint.folder, planned.graph.block_count)
        return checkpoint, StepRecord(planned.step.use, slot.key, facts, checkpoint.digest, cached, found)


def _weighed(build: Build, start: _Before, made: Checkpoint) -> Build:
    """The build planned again, once what was pruned is compared with the whole model in as many bytes.

    start  the source

    Raises StepFailed where pruning loses and the recipe wants to stop then.
    """
    found = build.plan.alternative
    if found is None or not found.possible:
        return build
    threads, processor = build.plan.threads, build.recipe.build.processor
    known = Known(start.digest, start.corpus.digest, seed_of(build.recipe), threads, processor)
    if found.predicted is None:
        facts = source_scores(build.recipe, start.graph, known)
        assert facts is not None  # steps that prune in order to be healed read the text
        gather_scores(build.cache, facts, start.checkpoint, start.graph, start.corpus.corpus, build.recipe.build.memory)
    facts = divergence_facts(made.digest, known)
    if found.predicted is None or build.cache.find(DIVERGENCE, facts) is None:
        tokens = judged(start.corpus.corpus().tokens)
        build.cache.remember(DIVERGENCE, facts, {"kl": _divergence(build, start.checkpoint, made, tokens)})
        build = plan(build)
        found = build.plan.alternative
        assert found is not None
        build.progress.say(found.words())
    if found.dominates and found.stop:
        raise StepFailed(
            f'{found.words()}; on_dominated = "stop" stops here. Take the pruning steps out and use quantize.auto with '
            f'target = "{found.nbytes} B", or set on_dominated = "say"'
        )
    return build


def _divergence(build: Build, before: Checkpoint, after: Checkpoint, tokens: Tensor) -> float:
    from llmpack.calibration.probing import divergence

    with capped_memory(build.recipe.build.memory), compute_threads(build.plan.threads):
        return divergence(before, after, (open_model(before), open_model(after)), tokens, build.progress)


def _choose(build: Build, index: int, before: _Before) -> Build:
    """The build planned again, once everything from which a step chooses is in the cache."""
    step = build.recipe.step[index]
    assert isinstance(step, QuantizeAuto)  # no other step has to choose
    facts = score_facts(
        before.graph,
        source=before.digest,
        corpus=str(before.corpus.digest),
        tokens=step.tokens,
        seed=seed_of(build.recipe),
        threads=build.plan.threads,
    )
    if step.mixes > 1:
        before.corpus.unseen(TOKENS)  # text that is too short is found now rather than hours later
    gather_scores(build.cache, facts, before.checkpoint, before.graph, before.corpus.corpus, build.recipe.build.memory)
    build = plan(build)
    _require_hope(build)
    mixes = list(build.plan.steps[index].mixes)
    if mixes:
        _compare(build, mixes, facts, before)
        build = plan(build)
    return build


def _compare(build: Build, mixes: list[Choice], facts: dict[str, Any], before: _Before) -> None:
    """Build mixes, each a step of its own in the cache, and remember which is best."""
    tokens = before.corpus.unseen(TOKENS)

    def build_mix(choice: Choice) -> Checkpoint:
        return _made(build, PlannedStep(choice.step, choice.graph, "to do", None), before, "mix of")[0]

    def measure(made: Checkpoint) -> float:
        return _divergence(build, before.checkpoint, made, tokens)

    compare(mixes, facts, build.cache, build_mix, measure)


class _Calibration:
    """The calibration text, read at most once and only if a step is not cached."""

    def __init__(self, build: Build) -> None:
        self._text, self._cache = build.calibration, build.cache
        self._corpus: Corpus | None = None

    @property
    def digest(self) -> str | None:
        """Digest of the tokens, None without a [calibration] section."""
        if self._text is None:
            return None
        return self._text.known_digest(self._cache) or self.corpus().digest

    def corpus(self) -> Corpus:
        """The tokens."""
        if self._text is None:
            raise StepFailed("a step asked for calibration text, and the recipe has none")
        if self._corpus is None:
            self._corpus = self._text.build(self._cache)
        return self._corpus

    def unseen(self, tokens: int) -> Tensor:
        """Sequences of the same sources that no step sees, to judge candidates on."""
        if self._text is None:
            raise StepFailed("candidates are judged on calibration text, and the recipe has none")
        return self._text.after(tokens)


def _run_step(
    build: Build, planned: PlannedStep, graph: ModelGraph, checkpoint: Checkpoint, slot: Slot, corpus: _Calibration
) -> Checkpoint:
    bench = Workbench(
        folder=slot.content,
        work=slot.work,
        source=build.origin.checkpoint,
        corpus=corpus.corpus() if planned.step.needs_corpus else None,
        seed=seed_of(build.recipe),
        threads=build.plan.threads,
        progress=build.progress,
        processor=build.recipe.build.processor,
    )
    with capped_memory(build.recipe.build.memory):
        done = planned.step.run(checkpoint, graph, bench)
    made = open_model(done)
    if made.tensors != planned.graph.tensors:
        wrong = [a.name for a, b in zip(made.tensors, planned.graph.tensors, strict=False) if a != b][:3]
        raise StepFailed(f"{planned.step.use} made something else than its preview promised: {', '.join(wrong)}")
    slot.finish({"digest": done.digest})
    return done
