"""Scores of a checkpoint, made once for one text and found again by everything that they depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmpack.calibration.scores import DAMPING, Scores, scorable
from llmpack.encodings import ENCODINGS
from llmpack.models import FAMILIES
from llmpack.models.graph import ModelGraph
from llmpack.pipeline.cache import Cache
from llmpack.pipeline.keys import platform_class
from llmpack.pipeline.memory_cap import capped_memory

if TYPE_CHECKING:
    from llmpack.calibration.corpus import Corpus
    from llmpack.checkpoint.checkpoint import Checkpoint

SCORES = "scores"
VERSION = 2
"""Raised when equal facts would give other scores."""


def score_facts(graph: ModelGraph, *, source: str, corpus: str, tokens: int, seed: int, threads: int) -> dict[str, Any]:
    """Everything that scores depend on.

    source  digest of the checkpoint that is scored
    corpus  digest of the calibration tokens, of which the first `tokens` are used
    """
    return {
        "name": "scores",
        "version": VERSION,
        "input": source,
        "corpus": corpus,
        "tokens": tokens,
        "damping": DAMPING,
        "seed": seed,
        "family": {"name": graph.family, "version": FAMILIES.load(graph.family).version},
        "encodings": {name: ENCODINGS.load(name).version for name in scorable()},
        "platform": platform_class(threads),
    }


def find_scores(cache: Cache, facts: dict[str, Any]) -> Scores | None:
    """The scores with these facts, if they were made before."""
    entry = cache.find(SCORES, facts)
    return None if entry is None else Scores.read(entry.content)


def gather_scores(
    cache: Cache,
    facts: dict[str, Any],
    checkpoint: Checkpoint,
    graph: ModelGraph,
    corpus: Callable[[], Corpus],
    memory: int | None = None,
) -> Scores:
    """The scores with these facts, found or made now; a killed run goes on at the block where it was.

    memory  as in ``[build]``
    """
    with cache.claim(SCORES, facts, "scores") as slot:
        if slot.entry is None:
            from llmpack.calibration.scoring import Scoring, first_sequences
            from llmpack.steps.blocks import compute_threads

            slot.content.mkdir(parents=True, exist_ok=True)
            with capped_memory(memory), compute_threads(facts["platform"]["threads"]):
                scores = Scoring(
                    checkpoint,
                    graph,
                    first_sequences(corpus(), facts["tokens"]),
                    work=slot.work,
                    seed=facts["seed"],
                    progress=cache.progress,
                ).run()
            scores.write(slot.content)
            slot.finish({"tokens": scores.tokens})
            for note in scores.notes:
                cache.progress.say(note)
        return Scores.read(slot.content)
