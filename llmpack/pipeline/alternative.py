"""What pruning is compared with: the whole model in as many bytes, quantized harder.

The alternative is the best mix of encodings that `quantize.auto` would choose for the source; its divergence is
predicted from the source's scores. What steps pruned is measured, on the last sequences of calibration text: first
before it is quantized, which is the least that it can lose, then as it is finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from llmpack.errors import Problem, RecipeError
from llmpack.models.graph import ModelGraph
from llmpack.pipeline.cache import Cache
from llmpack.pipeline.chain import Known, PlannedStep
from llmpack.pipeline.choosing import choose
from llmpack.pipeline.keys import platform_class
from llmpack.pipeline.limits import Setting
from llmpack.pipeline.mixes import TOKENS
from llmpack.pipeline.recipe import Recipe
from llmpack.pipeline.scoring import find_scores, score_facts
from llmpack.steps.quantize import FLOATS
from llmpack.steps.quantize_auto import QuantizeAuto

if TYPE_CHECKING:
    from torch import Tensor

    from llmpack.steps.prune_depth import PruneDepth
    from llmpack.steps.prune_width import PruneWidth

PRUNING = ("prune.depth", "prune.width")
DIVERGENCE = "divergence"
VERSION = 1
"""Raised when equal checkpoints would give another divergence."""


def judged(tokens: Tensor) -> Tensor:
    """The last sequences [n, T] of the calibration text, about `TOKENS` tokens and at least one sequence."""
    return tokens[-max(1, min(len(tokens), TOKENS // tokens.shape[1])) :]


@dataclass(frozen=True)
class Alternative:
    """The whole model in as many bytes as the pruned one.

    nbytes     of the model file
    smallest   of the file of the smallest mix of encodings that the whole model can have
    stop       whether the build is to stop where pruning loses
    predicted  divergence of the best mix of that size, nats per token; None until the source is scored, and where there
               is no mix that small
    measured   divergence of what is pruned, None until a build measured it
    tokens     of calibration text on which the source is scored
    finished   whether that was measured after the last step; else before the first that quantizes
    """

    nbytes: int
    smallest: int | None
    stop: bool
    predicted: float | None = None
    measured: float | None = None
    finished: bool = False
    tokens: int = 0

    @property
    def possible(self) -> bool:
        """Whether the whole model can be that small."""
        return self.smallest is not None and self.smallest <= self.nbytes

    @property
    def dominates(self) -> bool:
        """Whether pruning lost more than the alternative is predicted to lose."""
        return self.predicted is not None and self.measured is not None and self.predicted < self.measured

    def words(self) -> str:
        """The comparison in a sentence."""
        size = f"{self.nbytes:,} bytes"
        if self.smallest is None:
            return "pruning has no alternative to be compared with: the whole model cannot be quantized as a whole"
        if not self.possible:
            return f"pruning has no alternative in {size}: the smallest mix of the whole model takes {self.smallest:,}"
        if self.predicted is None:
            return (
                f"pruning is to be compared with the whole model in {size}, which is not scored yet; the build does "
                "that, or `llmpack sensitivity` with this recipe"
            )
        other = f"KL {self.predicted:.4g} predicted for the whole model in {size} (second-order model, not measured)"
        if self.measured is None:
            return f"alternative to pruning: {other}; what pruning costs is measured by the build"
        own = f"KL {self.measured:.4g} measured {'when finished' if self.finished else 'before quantization'}"
        if self.dominates:
            return f"pruning is dominated: {own}, against {other}; quantize.auto without pruning may do better"
        return f"pruning holds: {own}, against {other}"

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "model_bytes": self.nbytes,
            "smallest_model_bytes": self.smallest,
            "predicted_kl": self.predicted,
            "predicted_by": "second-order model, not measured",
            "measured_kl": self.measured,
            "measured": "finished" if self.finished else "before quantization",
            "dominates": self.dominates,
        }


def alternative_to(
    recipe: Recipe,
    graph: ModelGraph,
    steps: Sequence[PlannedStep],
    nbytes: int,
    known: Known,
    setting: Setting,
    cache: Cache,
) -> Alternative | None:
    """The comparison as far as it is known; None where no step prunes, none wants to be compared, or there is no text.

    graph   of the source
    nbytes  of the model file that the steps lead to

    Raises RecipeError where the build is to stop on a comparison that has no text.
    """
    asked = [cast("PruneDepth | PruneWidth", step).on_dominated for step in recipe.step if step.use in PRUNING]
    if all(one == "skip" for one in asked):
        return None
    if recipe.calibration is None:
        if "stop" in asked:
            raise RecipeError(
                [Problem('on_dominated = "stop" compares on calibration text; add [calibration]', "step")]
            )
        return None
    step = _whole(recipe, nbytes)
    found = Alternative(nbytes, _smallest(step, graph, setting), "stop" in asked, tokens=step.tokens)
    if not found.possible:
        return found
    facts = source_scores(recipe, graph, known)
    scores = find_scores(cache, facts) if facts is not None else None
    predicted = choose(step, graph, scores, setting).predicted if scores is not None else None
    measured, finished = _measured(steps, known, cache)
    return replace(found, predicted=predicted, measured=measured, finished=finished)


def source_scores(recipe: Recipe, graph: ModelGraph, known: Known) -> dict[str, Any] | None:
    """Facts of the scores that the alternative is predicted from, the same as `llmpack sensitivity` makes."""
    if known.source is None or known.corpus is None:
        return None
    return score_facts(
        graph,
        source=known.source,
        corpus=known.corpus,
        tokens=_whole(recipe, 1).tokens,
        seed=known.seed,
        threads=known.threads,
    )


def divergence_facts(made: str, known: Known) -> dict[str, Any]:
    """What the divergence of a checkpoint of digest `made` from the source depends on."""
    return {
        "name": DIVERGENCE,
        "version": VERSION,
        "source": known.source,
        "made": made,
        "corpus": known.corpus,
        "tokens": TOKENS,
        "platform": platform_class(known.threads),
    }


def compared_after(steps: Sequence[PlannedStep]) -> list[int]:
    """The steps after which the comparison is made: the last before anything is quantized, and the last of all."""
    pruned = [at for at, one in enumerate(steps) if one.step.use in PRUNING]
    if not pruned:
        return []
    plain = [at for at, one in enumerate(steps) if {spec.encoding for spec in one.graph.tensors} <= set(FLOATS)]
    return sorted({max(plain), len(steps) - 1})


def _measured(steps: Sequence[PlannedStep], known: Known, cache: Cache) -> tuple[float | None, bool]:
    """The divergence that was measured last, and whether after the last step."""
    for at in reversed(compared_after(steps)):
        made = steps[at].made
        entry = cache.find(DIVERGENCE, divergence_facts(made, known)) if made is not None else None
        if entry is not None:
            return float(entry.result["kl"]), at == len(steps) - 1
    return None, False


def _whole(recipe: Recipe, nbytes: int) -> QuantizeAuto:
    """quantize.auto as the recipe has it, if it does, on the whole model."""
    target = f"{nbytes} B"
    own = next((step for step in recipe.step if isinstance(step, QuantizeAuto)), None)
    return own.model_copy(update={"target": target}) if own else QuantizeAuto(use="quantize.auto", target=target)


def _smallest(step: QuantizeAuto, graph: ModelGraph, setting: Setting) -> int | None:
    try:
        return setting.size(step.bounds(graph)[0])
    except RecipeError:
        return None  # a source that is stored in codes, or has rows that nothing fits
