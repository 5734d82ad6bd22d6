"""What was measured on one machine, projected onto another by the ratio of what both can do.

Writing follows the bandwidth of memory, reading the rate of arithmetic. A projection is an estimate and never more:
other kernels, other caches and other thermal limits are not in it, so its interval is wide. It is made only from
figures that both machines have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmpack.target.budget import Evidence, Finding
from llmpack.target.device import Device, Figure

ALIKE_ERROR, UNLIKE_ERROR = 0.35, 0.50
"""How wrong a projection may be, as a share: where both figures were measured, and where one is nominal."""


def project(findings: Sequence[Finding], here: Device, there: Device) -> list[Finding]:
    """Estimates for `there` from what was measured on `here`; empty where no figure is known of both.

    findings  of any kind; only usable measurements of speed made on `here` count
    """
    made = []
    for finding in findings:
        if finding.evidence.kind != "measurement" or finding.evidence.device != here.fingerprint or not finding.usable:
            continue
        found = _ratio(finding.limit, here, there)
        if found is not None:
            made.append(_projected(finding, here, there, *found))
    return made


def _ratio(limit: str, here: Device, there: Device) -> tuple[float, float, str] | None:
    """How many times faster `there` is at what decides a limit, how wrong that may be, and of what it is the ratio."""
    pairs: dict[str, tuple[Figure[Any] | None, Figure[Any] | None, str]] = {
        "decode": (here.figures.bandwidth, there.figures.bandwidth, "bandwidth"),
        "prefill": (here.figures.f32, there.figures.f32, "f32 arithmetic"),
        "first_token": (here.figures.f32, there.figures.f32, "f32 arithmetic"),
    }
    ours, theirs, what = pairs.get(limit, (None, None, ""))
    if ours is None or theirs is None:
        return None
    alike = ours.provenance == theirs.provenance == "measured"
    return theirs.value / ours.value, ALIKE_ERROR if alike else UNLIKE_ERROR, what


def _projected(finding: Finding, here: Device, there: Device, ratio: float, error: float, what: str) -> Finding:
    delay = finding.limit == "first_token"
    value = finding.value / ratio if delay else finding.value * ratio
    evidence = Evidence(
        kind="estimate",
        artifact=finding.evidence.artifact,
        device=there.fingerprint,
        machine=there.description,
        settings=finding.evidence.settings,
        build=finding.evidence.build,
    )
    reason = f"projected from {here.description} by {ratio:.3g} times its {what}, {error:.0%} off at most"
    best = value / (1 + error) if delay else value * (1 + error)
    return Finding(limit=finding.limit, value=value, best=best, evidence=evidence, reason=reason)
