"""The manifest: what a bundle was made from, how, and what was found.

It has two parts. `made` follows from the recipe, its inputs and the machine class alone: the same build gives the
same bytes, and `made_sha256` is their digest. `observed` holds what was measured, when, and the verdict: it differs
from run to run.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from llmpack import __version__
from llmpack.digest import sha256_value
from llmpack.errors import Problem, VerificationFailed
from llmpack.formats.bundle import MODEL
from llmpack.models import FAMILIES
from llmpack.pipeline.keys import ARITHMETIC, installed, platform_class
from llmpack.pipeline.state import Artifact, Build
from llmpack.target.budget import Finding, Verdict

FORMAT = 1
_RECORDED = (*ARITHMETIC, "tokenizers", "safetensors", "pydantic", "bitsandbytes", "gptqmodel", "optimum")


class Observed(BaseModel):
    """The part of a manifest that may differ between two equal builds.

    findings  every figure with its evidence, so that a verdict can be given again
    reports   measurements in full, by name
    verdict   for the first device of the recipe
    others    for the other devices
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    made_at: str
    findings: tuple[Finding, ...]
    reports: dict[str, Any]
    estimate: dict[str, Any]
    verdict: Verdict
    others: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """For every device."""
        return (self.verdict, *self.others)


@dataclass(frozen=True)
class Manifest:
    """A manifest, read or to be written."""

    made: Mapping[str, Any]
    observed: Observed

    def text(self) -> str:
        """As it is written."""
        document = {
            "format": FORMAT,
            "llmpack": __version__,
            "made": self.made,
            "made_sha256": sha256_value(self.made),
            "observed": self.observed.model_dump(mode="json"),
        }
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, document: Mapping[str, Any], where: str) -> Manifest:
        """From the JSON of a bundle. Raises VerificationFailed for another version or a changed part."""
        if document.get("format") != FORMAT:
            message = f"manifest format {document.get('format')!r}; this llmpack reads {FORMAT}"
            raise VerificationFailed([Problem(message, where=where)])
        made = document.get("made")
        if not isinstance(made, dict) or document.get("made_sha256") != sha256_value(made):
            raise VerificationFailed([Problem("the recorded part `made` is not what its digest says", where=where)])
        try:
            observed = Observed.model_validate_json(json.dumps(document.get("observed")))
        except ValidationError as error:
            problems = [
                Problem(e["msg"], path=".".join(map(str, ("observed", *e["loc"]))), where=where) for e in error.errors()
            ]
            raise VerificationFailed(problems) from error
        return cls(made, observed)


def made(build: Build) -> dict[str, Any]:
    """The part that equal builds share."""
    planned, origin = build.plan, build.origin
    return {
        "name": build.recipe.name,
        "recipe": build.recipe.options(),
        "source": {
            "reference": build.recipe.source.model,
            "resolved": dict(origin.located.resolved),
            "digest": build.source,
            "family": {"name": origin.graph.family, "version": FAMILIES.load(origin.graph.family).version},
            "dequantized": dict(origin.dequantized),
            "licence": [asdict(fact) for fact in origin.located.licence.facts],
        },
        "corpora": dict(build.corpora),
        "steps": [
            {
                "use": step.use,
                "key": step.key,
                "facts": dict(step.facts),
                "found": dict(step.found),
                "output": step.output,
            }
            for step in build.steps
        ],
        "artifact": {
            **_artifact_files(build.artifact),
            "bytes": build.artifact.nbytes,
            "sha256": build.artifact.sha256,
            "parameters": planned.graph.parameters,
            "bits_per_weight": planned.bits_per_weight,
            "encodings": {name: {"tensors": n, "bytes": b} for name, (n, b) in planned.totals.items()},
        },
        "platform": platform_class(planned.threads, build.recipe.build.processor),
        "versions": {"llmpack": __version__, "python": platform.python_version(), **_versions()},
    }


def _artifact_files(artifact: Artifact) -> dict[str, Any]:
    """The file of a GGUF bundle, or every file of a model folder with its digest."""
    files = {} if artifact.file == MODEL else {"files": dict(artifact.digests)}
    return {"file": artifact.file, **files}


def _versions() -> dict[str, str]:
    return {name: found for name in _RECORDED if (found := installed(name)) is not None}


def lock(build: Build) -> dict[str, Any]:
    """What the references of the recipe stood for: enough to tell whether a second build has the same inputs."""
    whole = made(build)
    return {
        "format": FORMAT,
        "overrides": list(build.order.overrides),
        "source": {key: whole["source"][key] for key in ("reference", "resolved", "digest")},
        "corpora": whole["corpora"],
        "steps": [{"use": step["use"], "key": step["key"], "output": step["output"]} for step in whole["steps"]],
        "artifact": {key: whole["artifact"][key] for key in ("file", "bytes", "sha256")},
        "platform": whole["platform"],
        "versions": whole["versions"],
    }
