"""Mixes compared by measurement: a few that quantize.auto may choose are built, and the best is remembered.

Divergence is that of each mix's own weights from the model, in float32, on sequences that come after the calibration
text in the same sources: no step has seen them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmpack.calibration.scores import Scores
from llmpack.models.graph import ModelGraph
from llmpack.pipeline.cache import Cache
from llmpack.pipeline.choosing import Choice, choose
from llmpack.pipeline.limits import Setting
from llmpack.pipeline.scoring import SCORES
from llmpack.steps.quantize_auto import QuantizeAuto

if TYPE_CHECKING:
    from llmpack.checkpoint.checkpoint import Checkpoint

MIXES = "mixes"
VERSION = 2
"""Raised when equal facts would give another order of mixes."""
EMPHASES = ("", "attention", "ffn", "embedding")
"""Parts whose errors count twice in the mixes beside the best one."""
TOKENS = 4096
"""Tokens on which mixes are compared."""


def alternatives(step: QuantizeAuto, graph: ModelGraph, scores: Scores, setting: Setting) -> list[Choice]:
    """The mixes that a step compares, the best by prediction first; none twice."""
    found: list[Choice] = []
    for emphasis in EMPHASES[: step.mixes]:
        choice = choose(step, graph, scores, setting, emphasis)
        if all(choice.step.encodings != other.step.encodings for other in found):
            found.append(choice)
    return found


def mix_facts(choices: list[Choice], scores: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a comparison depends on; corpus, seed and platform are among the facts of the scores."""
    return {
        "name": MIXES,
        "version": VERSION,
        "scores": Cache.key(SCORES, scores),
        "step": choices[0].step.version,
        "mixes": [choice.step.model_dump(mode="json") for choice in choices],
        "tokens": TOKENS,
    }


def known_best(choices: list[Choice], scores: Mapping[str, Any], cache: Cache) -> Choice | None:
    """The mix that a comparison found to be best; the only one, where there is one; None if none was made yet."""
    if len(choices) == 1:
        return choices[0]
    entry = cache.find(MIXES, mix_facts(choices, scores))
    if entry is None:
        return None
    pairs = [(choice.predicted, float(kl)) for choice, kl in zip(choices, entry.result["measured"], strict=True)]
    best = min(range(len(pairs)), key=lambda at: pairs[at][1])
    return replace(choices[best], compared=(pairs[best], *pairs[:best], *pairs[best + 1 :]))


def compare(
    choices: list[Choice],
    scores: Mapping[str, Any],
    cache: Cache,
    build: Callable[[Choice], Checkpoint],
    measure: Callable[[Checkpoint], float],
) -> None:
    """Build every mix and remember its measured divergence."""
    measured = [measure(build(choice)) for choice in choices]
    cache.remember(MIXES, mix_facts(choices, scores), {"measured": measured})
