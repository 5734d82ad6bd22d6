"""`llmpack check`: judge a finished bundle again, against its budget, another one, or another device.

What was found when the bundle was made counts as long as file, machine, settings and context are the same;
only what these do not cover is measured again, and only where the device is this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpack.errors import RecipeError
from llmpack.pipeline.cache import Cache
from llmpack.pipeline.evidence import MEASURED_LIMITS, measurement, needs_measuring
from llmpack.pipeline.keys import installed
from llmpack.pipeline.packed import Packed
from llmpack.target.budget import Evidence, Finding, Verdict, judge
from llmpack.target.cure import cures
from llmpack.target.device import HOST, Device, device
from llmpack.target.estimate import estimate
from llmpack.target.measure import STANDARD, Protocol


@dataclass(frozen=True)
class Checked:
    """A verdict given again.

    measured  whether something had to be measured for it
    """

    path: Path
    verdict: Verdict
    measured: bool

    @property
    def passed(self) -> bool:
        """True only if every declared limit is kept."""
        return self.verdict.passes

    @property
    def title(self) -> str:
        """One line above the verdict."""
        how = "measured now" if self.measured else "from the evidence at hand"
        return f"{self.path} for {self.verdict.device} at {self.verdict.context} tokens of context, {how}:"

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "path": str(self.path),
            "passes": self.passed,
            "measured": self.measured,
            "verdict": self.verdict.to_json(),
        }


def check_bundle(
    path: Path,
    cache: Cache,
    *,
    limits: Sequence[str] = (),
    device_name: str | None = None,
    accept: str | None = None,
    protocol: Protocol = STANDARD,
) -> Checked:
    """Judge a bundle or a GGUF file.

    limits       changes of the budget, such as ``memory=300MiB``
    device_name  another device than the recipe's; "host" is this machine

    Raises RecipeError for limits that cannot be, VerificationFailed for a changed bundle, RuntimeFailed.
    """
    changes = [f"budget.{limit}" for limit in limits]
    changes += [f"target.device={device_name}"] if device_name else []
    changes += [f"target.accept={accept}"] if accept else []
    packed = Packed.open(path, changes, cache)
    recipe = packed.recipe
    chosen = device(recipe.target.device)
    problems = recipe.budget.problems(chosen, packed.graph.config.get("max_position_embeddings"))
    if problems:
        raise RecipeError(problems)
    findings = [finding for finding in packed.findings if _still_holds(finding, packed, chosen)]
    known = {finding.limit for finding in findings if finding.usable}
    asked = MEASURED_LIMITS & recipe.budget.limits.keys()
    measured = False
    if recipe.target.device == HOST and needs_measuring(recipe.budget) and not asked <= known:
        found = measurement(packed.subject, chosen, recipe.budget.context, cache, protocol=protocol)
        findings += found.findings
        measured = True
    findings.append(_disk(packed, chosen))
    guess = estimate(packed.graph, recipe.runtime, chosen, recipe.budget.context)
    verdict = judge(
        recipe.budget,
        (*guess.findings(packed.sha256), *findings),
        chosen,
        accept=recipe.target.accept,
        cure=cures(packed.graph, recipe.runtime, chosen, recipe.budget.context),
        missing=guess.missing,
    )
    return Checked(path, verdict, measured)


def _still_holds(finding: Finding, packed: Packed, chosen: Device) -> bool:
    """Whether a figure that was found when the bundle was made says something about this question."""
    if finding.limit == "disk":
        return False  # looked at again, since that costs nothing
    if finding.limit not in MEASURED_LIMITS:
        return True
    same_context = finding.evidence.settings.get("context") == packed.recipe.budget.context
    if not same_context or finding.evidence.device != chosen.fingerprint:
        return False
    runtime = installed("llama-cpp-python")
    made_with = packed.manifest.made["versions"].get("llama-cpp-python") if packed.manifest else None
    return packed.recipe.target.device != HOST or runtime is None or runtime == made_with


def _disk(packed: Packed, chosen: Device) -> Finding:
    evidence = Evidence(
        kind="measurement", artifact=packed.sha256, device=chosen.fingerprint, machine=chosen.description
    )
    return Finding(limit="disk", value=packed.disk, best=packed.disk, evidence=evidence, reason="in blocks of 4 KiB")
