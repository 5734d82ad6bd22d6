"""Budget, Verdict and Row: what was declared, and whether the evidence keeps it.

A row exists for every declared limit and for no other. It FAILs on a measurement that breaks the
limit, unless something disturbed it, and on an estimate that breaks it by more than the estimate may
be wrong. It PASSes only on a measurement made on the declared device; an estimate lets it pass only
where the recipe says ``accept = "estimate"``, and the row then says so. Everything else is
UNMEASURED, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pydantic import ConfigDict, Field

from llmpack.documented import Documented
from llmpack.errors import Problem
from llmpack.target.device import Device
from llmpack.target.quantities import Rate, Seconds, Size
from llmpack.units import format_rate, format_seconds, format_size

Status = Literal["PASS", "FAIL", "UNMEASURED"]
Accept = Literal["measurement", "estimate"]
LimitName = Literal[
    "memory", "disk", "decode", "prefill", "first_token", "load",
    "quality.kl", "quality.kl_p99", "quality.top1", "quality.ppl_ratio",
]  # fmt: skip
AT_LEAST: frozenset[str] = frozenset({"decode", "prefill", "quality.top1"})
"""Limits that the value must reach; all others it must not exceed."""
ANYWHERE: frozenset[str] = frozenset({"disk", "quality.kl", "quality.kl_p99", "quality.top1", "quality.ppl_ratio"})
"""Limits whose value does not depend on the machine that measured it."""
MEASURED_LIMITS: frozenset[str] = frozenset({"memory", "decode", "prefill", "first_token", "load"})
"""Limits that only a run on the device can answer."""
DEFAULT_CONTEXT = 2048


class _Frozen(Documented):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class QualityBudget(_Frozen):
    """How far the artifact may be from its source on the evaluation text."""

    kl: float | None = Field(default=None, gt=0)
    """Mean Kullback-Leibler divergence from the source, nats per token."""
    kl_p99: float | None = Field(default=None, gt=0)
    """Its 99th percentile over tokens."""
    top1: float | None = Field(default=None, gt=0, le=1)
    """Share of tokens where both find the same token likeliest, at least."""
    ppl_ratio: float | None = Field(default=None, gt=0)
    """Perplexity of the artifact over that of the source."""


class Budget(_Frozen):
    """The ``[budget]`` table: the limits of a device. What is not declared is not judged."""

    memory: Size | None = None
    """Peak resident memory of the runtime's process at the full context."""
    disk: Size | None = None
    """The whole bundle."""
    context: int = Field(default=DEFAULT_CONTEXT, ge=16, le=1 << 24)
    """Tokens of context under which the other limits hold."""
    decode: Rate | None = None
    """Tokens per second when writing at the full context, at least."""
    prefill: Rate | None = None
    """Tokens per second when reading a prompt of the full context, at least."""
    first_token: Seconds | None = None
    """From a prompt of the full context, with the model loaded, to the first token of the answer."""
    load: Seconds | None = None
    """From a cold start to a model that is ready."""
    quality: QualityBudget | None = None
    """Distance from the source model."""

    @property
    def limits(self) -> dict[LimitName, float]:
        """The declared limits by name, in bytes, tokens per second, seconds, nats and ratios."""
        plain: tuple[LimitName, ...] = ("memory", "disk", "decode", "prefill", "first_token", "load")
        found: dict[LimitName, float] = {name: value for name in plain if (value := getattr(self, name)) is not None}
        if self.quality:
            named: dict[LimitName, float | None] = {
                "quality.kl": self.quality.kl,
                "quality.kl_p99": self.quality.kl_p99,
                "quality.top1": self.quality.top1,
                "quality.ppl_ratio": self.quality.ppl_ratio,
            }
            found |= {name: value for name, value in named.items() if value is not None}
        return found

    def problems(self, device: Device, trained_context: int | None = None) -> list[Problem]:
        """What cannot be, whatever is built: a context beyond the model's, more memory than the device has."""
        found = []
        if trained_context is not None and self.context > trained_context:
            text = f"a context of {self.context} is beyond the {trained_context} tokens that the model was trained for"
            found.append(Problem(f"{text}; lower it", path="budget.context"))
        if self.memory is not None and self.memory > device.memory:
            text = f"{format_size(self.memory)} is more than the {format_size(device.memory)} of {device.name}"
            found.append(Problem(f"{text}; lower it", path="budget.memory"))
        return found


class Evidence(_Frozen):
    """What a figure rests on, so that it can be judged again without measuring again.

    artifact  digest of the file that was measured or estimated
    device    fingerprint of the machine that it holds for
    machine   that machine in words
    settings  RuntimeSettings, context and effective modes
    build     commit and version of the runtime
    """

    kind: Literal["estimate", "measurement"]
    artifact: str = ""
    device: str = ""
    machine: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)
    build: dict[str, str] = Field(default_factory=dict)


class Finding(_Frozen):
    """One figure with its evidence.

    value   the figure that is judged; of a measurement the pessimistic side
    best    the same at the optimistic end of what an estimate may be wrong by; equal to `value` for a measurement
    reason  how it came about ("p10 of 7 repetitions, median 9.31"), or why it is missing
    usable  False for a measurement too noisy to be used; `reason` says so
    worst   of what is noisy, the worst of all repetitions: it may keep a limit, and cannot break it
    disturbed  what made a measurement worse than the device is: it may keep its limit, and cannot break it
    """

    limit: LimitName
    value: float
    best: float
    evidence: Evidence
    reason: str = ""
    usable: bool = True
    worst: float | None = None
    disturbed: str = ""


class Row(_Frozen):
    """One limit, judged.

    value   the figure, None where there is none
    margin  percent of the limit that is left; negative where it is broken
    cure    the cheapest known change that would keep the limit
    """

    limit: LimitName
    status: Status
    value: float | None
    bound: float
    margin: float | None
    evidence: Evidence | None
    reason: str = ""
    cure: str = ""

    @property
    def text(self) -> str:
        """One line: ``memory 212.4 MiB of at most 350 MiB: PASS, 39.3 % left``."""
        word = "at least" if self.limit in AT_LEAST else "at most"
        value = "unknown" if self.value is None else format_figure(self.limit, self.value)
        left = "" if self.margin is None else f", {abs(self.margin):.3g} % {'left' if self.margin >= 0 else 'short'}"
        why = f" ({self.reason})" if self.reason else ""
        cure = f"; {self.cure}" if self.cure else ""
        return f"{self.limit} {value} of {word} {format_figure(self.limit, self.bound)}: {self.status}{left}{why}{cure}"


class Verdict(_Frozen):
    """The budget against the evidence, a row for each declared limit."""

    format: Literal[1] = 1
    device: str
    """Name of the device that it speaks for."""
    fingerprint: str
    context: int
    accept: Accept
    rows: tuple[Row, ...]

    @property
    def passes(self) -> bool:
        """True only if every declared limit is kept; a limit without evidence is not kept."""
        return all(row.status == "PASS" for row in self.rows)

    @property
    def on_estimates(self) -> bool:
        """True if some row passes on an estimate alone."""
        return any(row.status == "PASS" and row.evidence and row.evidence.kind == "estimate" for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """JSON values, with a format version."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Verdict:
        """The inverse of `to_json`. Raises pydantic's ValidationError for anything else."""
        return cls.model_validate_json(json.dumps(dict(values)))


Cure = Callable[[LimitName, float], str]
"""Gives the cheapest change that saves (or gains) so much of a limit's unit, or an empty text."""


def judge(
    budget: Budget,
    findings: Sequence[Finding],
    device: Device,
    *,
    accept: Accept = "measurement",
    cure: Cure | None = None,
    missing: Mapping[str, str] | None = None,
) -> Verdict:
    """Every declared limit against the evidence.

    findings  any number; a usable measurement of the device goes before an estimate
    cure      asked for each row that does not pass; see `target.cure`
    missing   by limit, why there is no figure ("the bandwidth of laptop-8gb is unknown")
    """
    rows = tuple(
        _row(name, bound, [f for f in findings if f.limit == name], device, accept, cure, (missing or {}).get(name, ""))
        for name, bound in budget.limits.items()
    )
    return Verdict(device=device.name, fingerprint=device.fingerprint, context=budget.context, accept=accept, rows=rows)


def _row(
    name: LimitName,
    bound: float,
    findings: Sequence[Finding],
    device: Device,
    accept: Accept,
    cure: Cure | None,
    missing: str,
) -> Row:
    finding, status, reason = _status(name, bound, findings, device, accept)
    if finding is None:
        return Row(limit=name, status="UNMEASURED", value=None, bound=bound, margin=None, evidence=None,
                   reason=missing or reason)  # fmt: skip
    margin = _margin(name, finding.value, bound)
    needed = abs(bound - finding.value)
    text = cure(name, needed) if cure is not None and margin < 0 else ""
    return Row(limit=name, status=status, value=finding.value, bound=bound, margin=margin, evidence=finding.evidence,
               reason=reason, cure=text)  # fmt: skip


def _status(
    name: LimitName, bound: float, findings: Sequence[Finding], device: Device, accept: Accept
) -> tuple[Finding | None, Status, str]:
    """The finding that counts, what it comes to, and the reason to show."""
    measured = [f for f in findings if f.evidence.kind == "measurement"]
    here = [f for f in measured if name in ANYWHERE or f.evidence.device == device.fingerprint]
    usable = [f for f in here if f.usable]
    if usable:
        kept = _margin(name, usable[-1].value, bound) >= 0
        if not kept and usable[-1].disturbed:
            return usable[-1], "UNMEASURED", usable[-1].disturbed
        return usable[-1], "PASS" if kept else "FAIL", usable[-1].reason
    if here:  # measured, and too noisy: no estimate overrules that
        return _noisy(name, bound, here[-1])
    estimates = [f for f in findings if f.evidence.kind == "estimate"]
    why = f"not measured on {device.name}"
    if measured:
        why = f"measured on {measured[-1].evidence.machine}, which is not {device.name}"
    if not estimates:
        return None, "UNMEASURED", why
    estimate = estimates[-1]
    if _margin(name, estimate.best, bound) < 0:
        return estimate, "FAIL", f"estimate: {estimate.reason}"
    if accept == "estimate":
        kept = _margin(name, estimate.value, bound) >= 0
        return estimate, "PASS" if kept else "FAIL", f"accepted on an estimate: {estimate.reason}"
    return estimate, "UNMEASURED", f"{why}; an estimate alone does not pass"


def _noisy(name: LimitName, bound: float, finding: Finding) -> tuple[Finding, Status, str]:
    """Noise that leaves the answer open is no evidence; a limit that even the worst repetition keeps is kept."""
    worst = finding.worst
    if worst is None or _margin(name, worst, bound) < 0:
        return finding, "UNMEASURED", finding.reason
    reason = f"{finding.reason}; this is the worst of all repetitions"
    return finding.model_copy(update={"value": worst, "best": worst, "reason": reason}), "PASS", reason


def _margin(name: LimitName, value: float, bound: float) -> float:
    room = value - bound if name in AT_LEAST else bound - value
    return 100 * room / bound


def format_figure(limit: str, value: float) -> str:
    """A figure in the unit of its limit: ``"212.4 MiB"``, ``"8.31 tok/s"``, ``"1.2 s"``, ``"0.0526"``."""
    if limit in ("memory", "disk"):
        return format_size(value)
    if limit in ("decode", "prefill"):
        return format_rate(value)
    if limit in ("first_token", "load"):
        return format_seconds(value)
    return f"{value:.4g}"
