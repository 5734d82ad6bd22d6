"""A finished model as `check` and `eval` take it up again: a bundle with its manifest, or a model alone.

A model alone is a GGUF file, or a folder of safetensors files as transformers saves one.

Modules that only bundles or measuring need are imported where they are needed: a check of a header takes half a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.errors import Problem, UsageError, VerificationFailed
from llmpack.formats.bundle import CONFIG, MANIFEST, Bundle, disk_usage
from llmpack.pipeline.cache import Cache
from llmpack.pipeline.model_folder import ModelFolder
from llmpack.pipeline.toml_positions import TomlDocument
from llmpack.runtime.settings import RuntimeSettings
from llmpack.target.budget import Finding
from llmpack.target.outline import Outline

if TYPE_CHECKING:
    from llmpack.pipeline.evidence import Subject
    from llmpack.pipeline.manifest import Manifest
    from llmpack.pipeline.recipe import Recipe


@dataclass(frozen=True)
class Packed:
    """A model and what was found out about it.

    path      as it was given
    model     the GGUF file, or the folder of safetensors files
    sha256    of the model as it is now; empty if its contents were not looked at
    manifest  None for a model alone
    disk      bytes of disk that all files of the bundle or of the model take, in whole blocks
    """

    path: Path
    model: GgufFile | ModelFolder
    sha256: str
    manifest: Manifest | None
    disk: int

    @classmethod
    def open(cls, path: Path, cache: Cache, *, contents: bool = True) -> Packed:
        """Open a bundle's folder, a GGUF file or a folder of safetensors files.

        contents  read the whole file for its digest; without it the header alone is read, and nothing that was
                  found about the bundle earlier is believed

        Raises VerificationFailed for a bundle whose model file is another one than its manifest describes,
        InputRejected for a damaged file, UsageError for something else.
        """
        if path.is_file():
            gguf = GgufFile.open(path)
            return cls(path, gguf, _digest(gguf, cache) if contents else "", None, disk_usage([gguf.size]))
        if not (path / MANIFEST).is_file() and ((path / CONFIG).is_file() or any(path.glob("*.safetensors"))):
            folder = ModelFolder.found(path)
            sizes = [(path / name).stat().st_size for name in folder.files]
            return cls(path, folder, _digest(folder, cache) if contents else "", None, disk_usage(sizes))
        from llmpack.pipeline.manifest import Manifest

        bundle = Bundle.open(path, contents=False)
        manifest = Manifest.read(bundle.manifest, str(path / MANIFEST))
        recorded = manifest.made["artifact"]
        model = ModelFolder.open(path, recorded) if bundle.model.is_dir() else GgufFile.open(bundle.model)
        digest = _digest(model, cache) if contents else ""
        if digest != recorded["sha256"] if contents else model.size != recorded["bytes"]:
            found = f"sha256 {digest}" if contents else f"{model.size} bytes"
            message = f"{recorded['file']} is not the model that the manifest describes ({found})"
            raise VerificationFailed([Problem(message, where=str(path))])
        sizes = [file.stat().st_size for file in path.iterdir()]
        return cls(path, model, digest, manifest, disk_usage(sizes))

    def subject(self, settings: RuntimeSettings) -> Subject:
        """The model and how it is run."""
        from llmpack.pipeline.evidence import Subject

        return Subject(self.model.path, self.sha256, settings)

    @property
    def options(self) -> Mapping[str, Any]:
        """The recipe that it was made with, as JSON values; empty for a model alone."""
        return self.manifest.made["recipe"] if self.manifest else {}

    def recipe(self) -> tuple[Recipe, TomlDocument]:
        """The recipe of a bundle. Raises UsageError for a model alone."""
        from llmpack.pipeline.recipe import validate

        if self.manifest is None:
            raise UsageError(f"{self.path}: only a bundle knows which model it was made from; give its folder")
        document = TomlDocument("recipe.toml", given(self.options))
        return validate(document), document

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What was found out when the bundle was made, about this very file."""
        known = self.manifest.observed.findings if self.manifest and self.sha256 else ()
        return tuple(finding for finding in known if finding.evidence.artifact == self.sha256)

    @cached_property
    def outline(self) -> Outline:
        """What its memory and speed follow from. Raises InputRejected."""
        return self.model.outline if isinstance(self.model, ModelFolder) else Outline.of_gguf(self.model)


def _digest(model: GgufFile | ModelFolder, cache: Cache) -> str:
    from llmpack.pipeline.origin import file_digest, folder_digest

    return folder_digest(model, cache) if isinstance(model, ModelFolder) else file_digest(model, cache)


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a file would have them: TOML has no null, so what was left out is left out again."""
    return {key: value for key, value in _without_nulls(options).items() if value != {}}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(inner) for inner in value]
    return value
