"""`llmpack sensitivity`: what each candidate encoding of each matrix is predicted to cost a model, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmpack.calibration.scores import Scores, TensorScore
from llmpack.encodings import ENCODINGS, encoding
from llmpack.errors import Problem, RecipeError, UsageError
from llmpack.pipeline.cache import Cache
from llmpack.pipeline.corpora import Text
from llmpack.pipeline.origin import open_origin
from llmpack.pipeline.plan import seed_of
from llmpack.pipeline.recipe import Recipe, read_recipe, validate
from llmpack.pipeline.scoring import gather_scores, score_facts
from llmpack.pipeline.toml_positions import TomlDocument
from llmpack.runtime.settings import usable_cores
from llmpack.steps.quantize_auto import QuantizeAuto

METHOD = "second-order model, scaled for each part by one measured divergence"
USUAL = ("iq4_nl", "q4_0", "q5_0", "q8_0", "f16")
"""Encodings in whose terms a model is shown, the first that all of its rows fit."""


@dataclass(frozen=True)
class Diagnosis:
    """The scores of a model, and what they rest on."""

    model: str
    text: tuple[str, ...]
    scores: Scores

    @property
    def usual(self) -> str:
        """An encoding that every matrix can have."""
        return next(name for name in USUAL if name in self.shared)

    @property
    def shared(self) -> tuple[str, ...]:
        """The encodings that every matrix can have, from few bits to many."""
        names = [name for name in ENCODINGS if all(name in one.predicted for one in self.scores.tensors)]
        return tuple(sorted(names, key=lambda name: encoding(name).bits_per_weight))

    def require(self, name: str) -> str:
        """The name of an encoding that every matrix can have. Raises UsageError for another."""
        if name not in self.shared:
            raise UsageError(f"not every matrix of {self.model} can be {name}; choose of {', '.join(self.shared)}")
        return name

    def total(self, name: str, *, nearest: bool = False) -> float:
        """Divergence with every matrix in one encoding."""
        return sum((one.nearest if nearest else one.predicted)[name] for one in self.scores.tensors)

    def most_sensitive(self, name: str, count: int) -> list[TensorScore]:
        """The matrices that cost most in an encoding."""
        return sorted(self.scores.tensors, key=lambda one: -one.predicted[name])[:count]

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "model": self.model,
            "text": list(self.text),
            "tokens": self.scores.tokens,
            "unit": "nats per token",
            "predicted_by": METHOD,
            "probes": [{**asdict(probe), "factor": probe.factor} for probe in self.scores.probes],
            "uniform": {name: self.total(name) for name in self.shared},
            "tensors": [_document(one) for one in self.scores.tensors],
            "notes": list(self.scores.notes),
        }


def _document(one: TensorScore) -> dict[str, Any]:
    return {
        "name": one.name,
        "part": one.part,
        "block": one.block,
        "shape": list(one.shape),
        "input_peak_over_rms": one.peak,
        "input_energy_in_top_1_percent": one.concentration,
        "predicted_kl": dict(one.predicted),
        "predicted_kl_nearest": dict(one.nearest),
        "relative_error": {name: value / one.energy if one.energy else 0.0 for name, value in one.nearest.items()},
    }


def diagnose(
    model: str,
    cache: Cache,
    *,
    text: Sequence[str] = (),
    tokens: int | None = None,
    dequantize: bool = False,
    overrides: Sequence[str] = (),
    offline: bool = False,
) -> Diagnosis:
    """Score a model: found in the cache, or made now.

    model  a source as recipes name it, or a recipe (a path ending in ``.toml``), whose source and text count
    text   calibration text for a source, as in a recipe; Python's help texts for none

    Raises RecipeError, EnvironmentProblem or InputRejected as a build does, UsageError for options that do not fit.
    """
    if model.endswith(".toml"):
        if text or dequantize:
            raise UsageError("a recipe says itself which text it uses and whether it dequantizes; change it with --set")
        recipe, document = read_recipe(Path(model), overrides)
    elif overrides:
        raise UsageError("--set changes a recipe, and this is a source")
    else:
        recipe, document = _of_source(model, text, tokens, dequantize)
    if recipe.calibration is None:
        raise RecipeError([Problem("scores rest on calibration text; add a [calibration] section", where=model)])
    origin = open_origin(recipe, document, cache, offline=offline)
    words = Text("calibration", recipe.calibration, document, origin.checkpoint, offline)
    step = next((one for one in recipe.step if isinstance(one, QuantizeAuto)), QuantizeAuto(use="quantize.auto"))
    facts = score_facts(
        origin.graph,
        source=origin.digest(cache),
        corpus=words.known_digest(cache) or words.build(cache).digest,
        tokens=tokens or step.tokens,
        seed=seed_of(recipe),
        threads=recipe.build.threads or usable_cores(),
    )
    scores = gather_scores(
        cache, facts, origin.checkpoint, origin.graph, lambda: words.build(cache), recipe.build.memory
    )
    return Diagnosis(model, recipe.calibration.text, scores)


def _of_source(model: str, text: Sequence[str], tokens: int | None, dequantize: bool) -> tuple[Recipe, TomlDocument]:
    values: Mapping[str, Any] = {
        "schema": 1,
        "name": "sensitivity",
        "source": {"model": model, "dequantize": dequantize},
        "calibration": {
            "text": list(text) or ["python:pydoc_data.topics"],
            "tokens": tokens or QuantizeAuto.model_fields["tokens"].default,
        },
    }
    document = TomlDocument("llmpack sensitivity", dict(values))
    return validate(document), document
