"""Stage 8, judge: the budget against everything that was found. A bundle that misses it is not published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from llmpack.errors import BudgetMissed
from llmpack.formats.bundle import copy_licences
from llmpack.models import family_of
from llmpack.pipeline.choosing import MORE
from llmpack.pipeline.contents import bundle_usage, small_files
from llmpack.pipeline.manifest import Observed
from llmpack.pipeline.output import outline_of
from llmpack.pipeline.state import Build
from llmpack.target.budget import Evidence, Finding, Verdict
from llmpack.target.budget import judge as judge_budget
from llmpack.target.cure import cures
from llmpack.units import format_size

_ROUNDS = 8


def judge(build: Build) -> Build:
    """Fill in `verdict` and `observed`. Raises BudgetMissed with the verdict."""
    names = copy_licences(build.origin.located.licence.files, build.workspace)
    licences = [build.workspace / name for name in names]
    made_at = datetime.now(UTC).isoformat(timespec="seconds")
    observed = _judged(build, build.artifact.nbytes, made_at)
    for _ in range(_ROUNDS):  # the verdict states the size of the bundle that it lies in
        usage = bundle_usage(build, small_files(build, observed), licences)
        before, observed = observed, _judged(build, usage, made_at)
        if observed == before:
            break
    if not all(verdict.passes for verdict in observed.verdicts):
        raise BudgetMissed(_headline(observed.verdicts), *observed.verdicts)
    return replace(build, verdict=observed.verdict, observed=observed)


def _judged(build: Build, usage: int, made_at: str) -> Observed:
    """Everything that was found, and the verdict on it, for a bundle that takes `usage` bytes of disk."""
    recipe, planned = build.recipe, build.plan
    evidence = Evidence(
        kind="measurement",
        artifact=build.artifact.sha256,
        device=planned.device.fingerprint,
        machine=planned.device.description,
    )
    disk = Finding(
        limit="disk", value=usage, best=usage, evidence=evidence, reason="the whole bundle, in blocks of 4 KiB"
    )
    findings = (*build.findings, disk)
    outline = outline_of(planned.file_format, planned.graph)
    verdicts = tuple(
        judge_budget(
            recipe.budget,
            (*(f for f in look.estimate.findings(build.artifact.sha256) if f.limit != "disk"), *findings),
            look.device,
            accept=recipe.target.accept,
            cure=cures(outline, recipe.runtime, look.device, recipe.budget.context),
            missing=look.estimate.missing,
        )
        for look in planned.outlooks
    )
    choices = [choice.document() for choice in planned.choices]
    return Observed(
        made_at=made_at,
        findings=findings,
        reports={**build.reports, **({"choices": choices} if choices else {}), **_alternative(build)},
        estimate=planned.estimate.to_json(),
        verdict=verdicts[0],
        others=verdicts[1:],
        notes=_notes(build, verdicts),
    )


def _alternative(build: Build) -> dict[str, Any]:
    found = build.plan.alternative
    return {} if found is None else {"alternative": found.document()}


def _notes(build: Build, verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    """What a user of the bundle should know."""
    config = build.plan.graph.config
    notes = [*build.checked.notes, *family_of(config).notes(config, build.recipe.budget.context)]
    if build.origin.dequantized:
        kinds = ", ".join(f"{count} tensors of {name}" for name, count in build.origin.dequantized.items())
        notes.append(f"the source was quantized already ({kinds}); what that lost is not counted here")
    notes += build.plan.twice
    guessed = [verdict.device for verdict in verdicts if verdict.on_estimates]
    if guessed:
        notes.append(f"some limits pass on an estimate alone: nothing was measured on {', '.join(guessed)}")
    if build.plan.alternative is not None:
        notes.append(build.plan.alternative.words())
    for choice in build.plan.choices:
        notes.append(
            f"encodings were chosen by predicted KL divergence: {choice.predicted:.4g} for this mix, "
            f"{choice.more:.4g} with {format_size(MORE)} more (second-order model, not measured)"
        )
    if build.plan.estimate.memory and build.plan.estimate.memory.other_load:
        load, nbytes = build.plan.estimate.memory.other_load
        notes.append(f'with load = "{load}" about {format_size(nbytes)} of memory (estimate)')
    return tuple(notes)


def _headline(verdicts: Sequence[Verdict]) -> str:
    rows = [row for verdict in verdicts for row in verdict.rows]
    missed = [row for row in rows if row.status != "PASS"]
    failed = sum(row.status == "FAIL" for row in missed)
    parts = [f"{failed} of {len(rows)} limits missed"] if failed else []
    parts += [f"{len(missed) - failed} not measured"] if len(missed) > failed else []
    return f"{', '.join(parts)}; nothing was published, finished work is kept"
