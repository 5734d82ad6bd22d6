"""The two texts of a recipe, calibration and evaluation: built when their tokens are needed, known by digest before."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpack.calibration import data_set
from llmpack.calibration.text import missing_texts
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.errors import Problem, RecipeError
from llmpack.pipeline.cache import Cache
from llmpack.pipeline.keys import file_facts, installed
from llmpack.pipeline.recipe import CalibrationSection, EvaluationSection
from llmpack.pipeline.toml_positions import TomlDocument

if TYPE_CHECKING:
    from torch import Tensor

    from llmpack.calibration.corpus import Corpus

CORPUS = "corpus"
MOST_OVERLAP = 0.01
"""Share of the evaluation text that may also be calibration text: boilerplate such as licences, not more."""


@dataclass(frozen=True)
class Text:
    """One text of a recipe with the tokenizer that cuts it.

    name     "calibration" or "evaluation", its section
    offline  touch no network
    """

    name: str
    section: CalibrationSection | EvaluationSection
    document: TomlDocument
    checkpoint: Checkpoint
    offline: bool = False

    @property
    def _base(self) -> Path:
        return Path(self.document.file).parent

    def facts(self) -> dict[str, Any]:
        """What the tokens depend on, as far as it can be seen without reading the text."""
        return {
            "name": self.name,
            "options": self.section.model_dump(mode="json"),
            "texts": [_text_facts(source, self._base) for source in self.section.text],
            "tokenizer": [file_facts(path) for path in self.checkpoint.tokenizer_files],
            "packages": {name: installed(name) for name in ("transformers", "tokenizers")},
        }

    def known_digest(self, cache: Cache) -> str | None:
        """The digest of the tokens, if they were made before and nothing has changed since."""
        entry = cache.find(CORPUS, self.facts())
        return None if entry is None else str(entry.result["digest"])

    def build(self, cache: Cache) -> Corpus:
        """The tokens. Raises RecipeError for text that is missing or too short."""
        corpus = self._built(self.section.tokens)
        cache.remember(CORPUS, self.facts(), {"digest": corpus.digest})
        return corpus

    def after(self, tokens: int) -> Tensor:
        """Sequences [N, length] of the same text that come after those of `build`: about so many tokens, at least one
        sequence. Raises RecipeError as `build`.
        """
        length = self.section.length
        more = max(1, tokens // length)
        return self._built((self.section.tokens // length + more) * length).tokens[-more:]

    def missing(self) -> list[Problem]:
        """Sources that are not there, as far as it can be seen without reading them."""
        return self._located(missing_texts(self.section.text, self._base))

    def _located(self, problems: Iterable[Problem]) -> list[Problem]:
        key = (self.name, "text")
        return [Problem(p.message, ".".join(key), self.document.where(key)) for p in problems]

    def _built(self, tokens: int) -> Corpus:
        from llmpack.calibration.corpus import build_corpus, load_tokenizer

        section = self.section
        try:
            return build_corpus(
                section.text,
                load_tokenizer(self.checkpoint),
                tokens=tokens,
                length=section.length,
                seed=section.seed,
                base=self._base,
                offline=self.offline,
            )
        except RecipeError as error:
            raise RecipeError(self._located(error.problems)) from error


def require_texts(calibration: Text | None, evaluation: Text | None, cache: Cache) -> dict[str, str]:
    """Digest of each text by its name, once all are known to be there, long enough, and apart from each other.

    Tokens are read only where this is not known from before. Raises RecipeError with the problems of both texts.
    """
    texts = [text for text in (calibration, evaluation) if text is not None]
    digests: dict[str, str] = {}
    built: dict[str, Corpus] = {}
    problems: list[Problem] = []
    for text in texts:
        known = text.known_digest(cache)
        try:
            if known is None:
                built[text.name] = text.build(cache)
        except RecipeError as error:
            problems += error.problems
        else:
            digests[text.name] = known or built[text.name].digest
    if problems:
        raise RecipeError(problems)
    if calibration is not None and evaluation is not None:
        facts = {"name": "apart", **digests}
        if cache.find(CORPUS, facts) is None:
            seen, judged = (built.get(text.name) or text.build(cache) for text in (calibration, evaluation))
            require_disjoint(seen, evaluation, judged)
            cache.remember(CORPUS, facts, {})
    return digests


def require_disjoint(calibration: Corpus, evaluation: Text, judged: Corpus) -> None:
    """Raises RecipeError if the text that judges quality is among the text that steps learned from."""
    shared = calibration.overlap(judged)
    if shared > MOST_OVERLAP:
        message = f"{shared:.1%} of the evaluation text is calibration text too; name text that no step has seen"
        raise RecipeError([evaluation.document.problem(("evaluation", "text"), message)])


def _text_facts(source: str, base: Path) -> Any:
    kind, _, module = source.partition(":")
    if kind == "python" and module:
        return {"python": sys.version}
    path = base / Path(source.partition("#")[0]).expanduser()
    if kind == data_set.KIND:
        folder = data_set.folder_of(module, base)
        if folder is None:
            return {"datasets": installed("datasets")}  # the source names a commit
        path = folder
    if path.is_dir():
        return [file_facts(inner) for inner in sorted(path.rglob("*")) if inner.is_file()]
    return file_facts(path) if path.is_file() else None
