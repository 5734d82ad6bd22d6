"""Stage 4, run: the steps, each found in the cache or done now, block by block, so that a killed build goes on."""

from __future__ import annotations

from dataclasses import replace

from llmpack.calibration.corpus import Corpus
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.journal import shard_note
from llmpack.errors import BudgetMissed, StepFailed
from llmpack.models import open_model
from llmpack.models.graph import ModelGraph
from llmpack.pipeline.cache import Slot
from llmpack.pipeline.host_memory import require_free_memory
from llmpack.pipeline.keys import step_facts
from llmpack.pipeline.memory_cap import capped_memory
from llmpack.pipeline.plan import STEP, PlannedStep, require_disk, seed_of
from llmpack.pipeline.state import Build, StepRecord
from llmpack.steps.blocks import shard_name
from llmpack.steps.step import Workbench


def run(build: Build) -> Build:
    """Fill in `source`, `corpora`, `checkpoint` and `steps`.

    Raises BudgetMissed if the plan cannot fit, EnvironmentProblem for lack of disk or memory, StepFailed and its kinds.
    """
    if build.plan.misses:
        raise BudgetMissed("the plan misses the budget before anything is built", *build.plan.verdicts)
    require_disk(build.plan)
    require_free_memory(build.plan.host_memory, build.recipe)
    source = build.origin.digest(build.cache)
    corpus = _Calibration(build)
    checkpoint, digest, graph = build.origin.checkpoint, source, build.origin.graph
    records: list[StepRecord] = []
    for planned in build.plan.steps:
        facts = step_facts(
            planned.step,
            source=digest,
            origin=source,
            corpus=corpus.digest if planned.step.needs_corpus else None,
            seed=seed_of(build.recipe),
            graph=planned.graph,
            threads=build.plan.threads,
        )
        with build.cache.claim(STEP, facts, f"step {len(records)} {planned.step.use}") as slot:
            cached = slot.entry is not None
            if cached:
                checkpoint = Checkpoint.reopen(slot.content)
            else:
                checkpoint = _run_step(build, planned, graph, checkpoint, slot, corpus)
            digest, graph = checkpoint.digest, planned.graph
            found = shard_note(checkpoint.folder, shard_name(None))
            records.append(StepRecord(planned.step.use, slot.key, facts, digest, cached, found))
    return replace(build, source=source, corpora=corpus.digests, checkpoint=checkpoint, steps=tuple(records))


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

    @property
    def digests(self) -> dict[str, str]:
        """Digest by name, for the record."""
        return {"calibration": self.digest} if self.digest else {}


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
    )
    with capped_memory(build.recipe.build.memory):
        done = planned.step.run(checkpoint, graph, bench)
    made = open_model(done)
    if made.tensors != planned.graph.tensors:
        wrong = [a.name for a, b in zip(made.tensors, planned.graph.tensors, strict=False) if a != b][:3]
        raise StepFailed(f"{planned.step.use} made something else than its preview promised: {', '.join(wrong)}")
    slot.finish({"digest": done.digest})
    return done
