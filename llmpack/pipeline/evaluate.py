"""`llmpack eval`: compare a bundle in its runtime with the model that it was made from, on any text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpack.errors import Problem, UsageError, VerificationFailed
from llmpack.pipeline.cache import Cache
from llmpack.pipeline.corpora import Text
from llmpack.pipeline.evidence import Original, quality
from llmpack.pipeline.origin import open_origin
from llmpack.pipeline.packed import Packed
from llmpack.pipeline.recipe import EvaluationSection, Recipe
from llmpack.target.device import HOST, device

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Evaluated:
    """What a comparison gave."""

    path: Path
    text: tuple[str, ...]
    report: Mapping[str, Any]

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {"path": str(self.path), "text": list(self.text), "quality": dict(self.report)}


def evaluate_bundle(
    path: Path, cache: Cache, *, text: Sequence[str] = (), tokens: int | None = None, offline: bool = False
) -> Evaluated:
    """Compare a bundle with its source, token by token.

    text    as in a recipe's [evaluation]; relative paths start at the current folder. Default: the recipe's own
    tokens  how many; default as in the recipe

    Raises VerificationFailed if the source is no longer the one that the bundle was made from.
    """
    packed = Packed.open(path, cache)
    recipe, document = packed.recipe()
    section = _section(recipe, text, tokens)
    origin = open_origin(recipe, document, cache, offline=offline)
    source = origin.digest(cache)
    if packed.manifest is not None and source != packed.manifest.made["source"]["digest"]:
        message = f"the source {recipe.source.model} is no longer the model that this bundle was made from"
        raise VerificationFailed([Problem(message, where=str(path))])
    words = Text("evaluation", section, document, origin.checkpoint, offline)
    digest = words.known_digest(cache) or words.build(cache).digest

    def cut() -> Tensor:
        return words.build(cache).tokens

    original = Original(origin.checkpoint, origin.graph, source, digest, cut)
    return Evaluated(path, section.text, quality(packed.subject(recipe.runtime), original, device(HOST), cache).report)


def _section(recipe: Recipe, text: Sequence[str], tokens: int | None) -> EvaluationSection:
    own = recipe.evaluation
    if own is None and not text:
        raise UsageError("the recipe of this bundle has no [evaluation]; name text with --text")
    changes: dict[str, Any] = {"text": tuple(text)} if text else {}
    changes |= {"tokens": tokens} if tokens is not None else {}
    if own is None:
        return EvaluationSection(**changes)
    return own.model_copy(update=changes)
