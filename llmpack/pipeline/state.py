"""Build: everything that is known while a bundle is made. Each stage returns it with more of it filled in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpack.formats.bundle import CONFIG, MODEL, model_digest
from llmpack.pipeline.cache import Cache
from llmpack.progress import QUIET, Progress

if TYPE_CHECKING:
    from llmpack.checkpoint.checkpoint import Checkpoint
    from llmpack.formats.bundle import Bundle
    from llmpack.formats.readback import ReadBack
    from llmpack.pipeline.corpora import Text
    from llmpack.pipeline.evidence import Subject
    from llmpack.pipeline.manifest import Observed
    from llmpack.pipeline.origin import Origin
    from llmpack.pipeline.plan import Plan
    from llmpack.pipeline.recipe import Recipe
    from llmpack.pipeline.toml_positions import TomlDocument
    from llmpack.target.budget import Finding, Verdict
    from llmpack.target.protocol import Protocol


class _Later:
    """Stands in a field until the stage that fills it has run."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a stage asked for .{name} of a field that no earlier stage has filled")


LATER: Any = _Later()
"""Default of a field that a stage fills."""


@dataclass(frozen=True)
class Order:
    """What the user asked for.

    recipe     the TOML file
    out        folder in which the bundle's folder is to appear
    overrides  ``path=value`` changes of the recipe
    offline    touch no network
    protocol   how long is measured; the standard one for None
    """

    recipe: Path
    out: Path
    cache: Cache
    overrides: tuple[str, ...] = ()
    offline: bool = False
    progress: Progress = QUIET
    protocol: Protocol | None = None


@dataclass(frozen=True)
class StepRecord:
    """One step as it was done.

    key     of its cache entry
    facts   what the key was computed from
    output  digest of the checkpoint that it wrote
    cached  whether it was done by an earlier build
    found   what it chose and measured, as JSON values
    """

    use: str
    key: str
    facts: Mapping[str, Any]
    output: str
    cached: bool
    found: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Artifact:
    """The model, written: a file, or the files of a model folder.

    path     of the file, or of the folder in which other files may lie too
    sizes    bytes of each file of the model, by name
    digests  hex sha256 of each, likewise
    """

    path: Path
    sizes: Mapping[str, int]
    digests: Mapping[str, str]

    @property
    def file(self) -> str:
        """The name of the file, or of that with which a loader begins."""
        return MODEL if MODEL in self.sizes else CONFIG

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes.values())

    @property
    def sha256(self) -> str:
        """The digest of the file, or of the digests of all files."""
        return model_digest(self.digests)


@dataclass(frozen=True)
class Build:
    """A bundle in the making: the order, and what each stage added.

    stage      fields
    read       recipe, document
    open       origin, calibration, evaluation
    plan       plan
    run        source (digest), corpora (digests), checkpoint, steps
    write      workspace, artifact
    read_back  checked
    measure    findings, reports
    judge      verdict, observed
    record     bundle
    """

    order: Order
    recipe: Recipe = LATER
    document: TomlDocument = LATER
    origin: Origin = LATER
    calibration: Text | None = None
    evaluation: Text | None = None
    plan: Plan = LATER
    source: str = ""
    corpora: Mapping[str, str] = field(default_factory=dict)
    checkpoint: Checkpoint = LATER
    steps: tuple[StepRecord, ...] = ()
    workspace: Path = LATER
    artifact: Artifact = LATER
    checked: ReadBack = LATER
    findings: tuple[Finding, ...] = ()
    reports: Mapping[str, Any] = field(default_factory=dict)
    verdict: Verdict = LATER
    observed: Observed = LATER
    bundle: Bundle = LATER

    @property
    def progress(self) -> Progress:
        """Where the stages tell how far they are."""
        return self.order.progress

    @property
    def cache(self) -> Cache:
        """Finished work."""
        return self.order.cache

    @property
    def subject(self) -> Subject:
        """The model file and how it is run."""
        from llmpack.pipeline.evidence import Subject

        return Subject(self.artifact.path, self.artifact.sha256, self.recipe.runtime)

    @property
    def final(self) -> Path:
        """The bundle's folder, once it is published."""
        return self.order.out / self.recipe.name

    def summary(self) -> dict[str, Any]:
        """The finished bundle as JSON values."""
        return {
            "bundle": str(self.final),
            "model": {"file": self.artifact.file, "bytes": self.artifact.nbytes, "sha256": self.artifact.sha256},
            "steps": [
                {"use": step.use, "key": step.key, "cached": step.cached, "found": dict(step.found)}
                for step in self.steps
            ],
            "verdicts": [verdict.to_json() for verdict in self.observed.verdicts],
            "notes": list(self.observed.notes),
        }
