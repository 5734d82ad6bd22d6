"""A finished model file as `check` and `eval` take it up again: a bundle with its manifest, or a GGUF file alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.errors import Problem, VerificationFailed
from llmpack.formats.bundle import MANIFEST, Bundle
from llmpack.models import family_of
from llmpack.models.from_gguf import gguf_graph
from llmpack.models.graph import ModelGraph
from llmpack.pipeline.cache import Cache
from llmpack.pipeline.contents import disk_usage
from llmpack.pipeline.evidence import Subject
from llmpack.pipeline.manifest import Manifest
from llmpack.pipeline.origin import file_digest
from llmpack.pipeline.recipe import Recipe, validate
from llmpack.pipeline.toml_positions import TomlDocument
from llmpack.target.budget import Finding

_NO_SOURCE: dict[str, Any] = {"schema": 1, "name": "model", "source": {"model": "unknown"}}


@dataclass(frozen=True)
class Packed:
    """A model file, the recipe that it was made with, and what was found out about it.

    sha256    of the model file as it is now
    recipe    with changes of the command line; of a bare file, defaults and those changes
    manifest  None for a bare file
    disk      bytes of disk that all files take, in whole blocks
    """

    path: Path
    model: Path
    sha256: str
    recipe: Recipe
    document: TomlDocument
    manifest: Manifest | None
    disk: int

    @classmethod
    def open(cls, path: Path, changes: Sequence[str], cache: Cache) -> Packed:
        """Open a bundle's folder or a GGUF file; `changes` are ``path=value`` of the recipe.

        Raises VerificationFailed for a bundle whose model file is another one than its manifest describes,
        InputRejected for a damaged file, RecipeError for wrong changes.
        """
        if path.is_file():
            gguf = GgufFile.open(path)
            recipe, document = _recipe(_NO_SOURCE, changes, str(path))
            digest = file_digest(gguf, cache)
            return cls(path, path, digest, recipe, document, None, disk_usage([gguf.size]))
        bundle = Bundle.open(path, contents=False)
        manifest = Manifest.read(bundle.manifest, str(path / MANIFEST))
        recipe, document = _recipe(manifest.made["recipe"], changes, "recipe.toml")
        digest = file_digest(GgufFile.open(bundle.model), cache)
        if digest != manifest.made["artifact"]["sha256"]:
            message = f"{bundle.model.name} is not the file that the manifest describes (sha256 {digest})"
            raise VerificationFailed([Problem(message, where=str(path))])
        sizes = [file.stat().st_size for file in path.iterdir()]
        return cls(path, bundle.model, digest, recipe, document, manifest, disk_usage(sizes))

    @property
    def subject(self) -> Subject:
        """The model file and how it is run."""
        return Subject(self.model, self.sha256, self.recipe.runtime)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What was found out when the bundle was made, about this very file."""
        known = self.manifest.observed.findings if self.manifest else ()
        return tuple(finding for finding in known if finding.evidence.artifact == self.sha256)

    @cached_property
    def graph(self) -> ModelGraph:
        """The tensors of the file with their encodings. Raises InputRejected."""
        gguf = GgufFile.open(self.model)
        plain = gguf_graph(gguf)
        encodings = {spec.name: gguf.tensors[str(spec.gguf_name)].encoding for spec in plain.tensors}
        return family_of(plain.config).graph(plain.config, encodings)


def _recipe(options: Mapping[str, Any], changes: Sequence[str], where: str) -> tuple[Recipe, TomlDocument]:
    values = {key: value for key, value in _without_nulls(options).items() if value != {}}
    document = TomlDocument(where, values).with_overrides(changes)
    return validate(document), document


def _without_nulls(value: Any) -> Any:
    """TOML has no null: what was left out is left out again."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(inner) for inner in value]
    return value
