"""Stage 7, measure: memory and speed in a fresh process, and quality against the source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmpack.pipeline.corpora import Text
from llmpack.pipeline.evidence import Original, measurement, needs_measuring, quality
from llmpack.pipeline.plan import is_host
from llmpack.pipeline.state import Build
from llmpack.target.budget import MEASURED_LIMITS, Finding, judge
from llmpack.target.device import HOST, Device, device
from llmpack.target.protocol import STANDARD

if TYPE_CHECKING:
    from torch import Tensor


def measure(build: Build) -> Build:
    """Fill in `findings` and `reports`.

    Speed and memory are measured only where the device is this machine and a limit asks for them; quality wherever
    the recipe has evaluation text. Raises RuntimeFailed.
    """
    findings: list[Finding] = []
    reports: dict[str, Any] = dict(build.reports)
    if build.evaluation is not None:
        text = build.corpora["evaluation"]
        found = quality(build.subject, _original(build, build.evaluation, text), device(HOST), build.cache)
        findings += found.findings
        reports["quality"] = found.report
    if is_host(build.recipe) and needs_measuring(build.recipe.budget):
        found = measurement(
            build.subject,
            _host(build),
            build.recipe.budget.context,
            build.cache,
            cap=build.recipe.budget.memory,
            protocol=build.order.protocol or STANDARD,
            good=lambda kept: _all_kept(build, kept),
        )
        findings += found.findings
        reports["measurement"] = found.report
    return replace(build, findings=tuple(findings), reports=reports)


def _host(build: Build) -> Device:
    return next(look.device for look in build.plan.outlooks if look.device.name == HOST)


def _original(build: Build, evaluation: Text, text: str) -> Original:
    def tokens() -> Tensor:
        return evaluation.build(build.cache).tokens

    origin = build.origin
    return Original(origin.checkpoint, origin.graph, build.source, text, tokens)


def _all_kept(build: Build, findings: Sequence[Finding]) -> bool:
    """Whether every limit that must be measured is kept by these figures."""
    verdict = judge(build.recipe.budget, findings, _host(build))
    return all(row.status == "PASS" for row in verdict.rows if row.limit in MEASURED_LIMITS)
