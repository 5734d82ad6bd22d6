"""`llmpack check`: judge a bundle or any model against a budget, for this machine or for other devices.

A model is a GGUF file, which runs in llama.cpp, or a folder of safetensors files, which runs in transformers.

What was found when a bundle was made counts as long as file, machine, settings and context are the same; only what
that does not cover is measured: where the device is this machine, or on a device that is reached over the network
(see `pipeline.remote`). No recipe is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpack.errors import Problem, RecipeError, UsageError
from llmpack.pipeline.cache import Cache
from llmpack.pipeline.packed import Packed, given
from llmpack.pipeline.terms import Terms, placed, read_terms
from llmpack.pipeline.toml_positions import TomlDocument
from llmpack.runtime.settings import foreign_to_llama, foreign_to_transformers
from llmpack.runtime.transformers_runtime import require_processor
from llmpack.target.budget import MEASURED_LIMITS, Evidence, Finding, Verdict, judge
from llmpack.target.cure import cures
from llmpack.target.device import HOST, Device, device
from llmpack.target.estimate import Estimate, estimate
from llmpack.target.probe import is_this_machine, probe_host
from llmpack.target.projection import project
from llmpack.target.protocol import MEMORY_ALONE, STANDARD, Protocol
from llmpack.target.speed_model import Rates

if TYPE_CHECKING:
    from llmpack.pipeline.remote import Reached


@dataclass(frozen=True)
class Checked:
    """Verdicts, one for each device.

    measured     whether something had to be measured for them
    header_only  whether the header alone was read
    on           address of the device that was reached, empty for none
    """

    path: Path
    verdicts: tuple[Verdict, ...]
    estimates: tuple[Estimate, ...]
    measured: bool
    header_only: bool
    on: str = ""

    @property
    def passed(self) -> bool:
        """True only if every declared limit is kept on every device."""
        return all(verdict.passes for verdict in self.verdicts)

    @property
    def source(self) -> str:
        """Where the figures are from, in words."""
        if self.header_only:
            return "from its header alone"
        if self.measured and self.on:
            return f"measured on {self.on}"
        return "measured now" if self.measured else "from the evidence at hand"

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "path": str(self.path),
            "passes": self.passed,
            "measured": self.measured,
            **({"on": self.on} if self.on else {}),
            "verdicts": [{**v.to_json(), "passes": v.passes} for v in self.verdicts],
            "estimates": [found.to_json() for found in self.estimates],
        }


@dataclass(frozen=True)
class Question:
    """What is asked about a file.

    budgets        budget files and limits such as ``memory=350 MiB``, each going before the one before it
    changes        ``path=value`` changes of the other terms
    devices        names or files of profiles; empty for the one of the terms
    accept         "estimate" lets computed figures pass; None for what the terms say
    estimate_only  read the header and nothing else; measure nothing
    on             address of another device, which is measured instead of this machine
    """

    budgets: Sequence[str] = ()
    changes: Sequence[str] = ()
    devices: Sequence[str] = ()
    accept: str | None = None
    estimate_only: bool = False
    on: str | None = None
    protocol: Protocol = STANDARD


def check(path: Path, cache: Cache, question: Question) -> Checked:
    """Judge a bundle, a GGUF file or a folder of safetensors files.

    Raises UsageError where no limit is declared, InputRejected for a damaged file or folder, RecipeError for limits
    that cannot be, VerificationFailed for a changed bundle, EnvironmentProblem for a device file that promises more
    than this machine has, RuntimeFailed; with another device what `pipeline.remote` raises.
    """
    if question.on is not None and question.estimate_only:
        raise UsageError("--on measures on a device, --estimate-only measures nothing; give one of them")
    packed = Packed.open(path, cache, contents=not question.estimate_only)
    accept = [f"target.accept={question.accept}"] if question.accept else []
    changes = (*question.changes, *accept)
    terms, document = read_terms(given(packed.options), "the bundle's recipe", question.budgets, changes)
    if not terms.budget.limits:
        text = 'no limit is declared, so there is nothing to judge; give one like --budget memory="350 MiB"'
        raise UsageError(f"{path}: {text}")
    names = question.devices or terms.target.names
    if question.on is not None:
        if not packed.outline.in_llama:
            text = "--on measures GGUF files, and this folder runs in transformers; run `llmpack check` on the device"
            raise UsageError(f"{path}: {text}")
        return _checked_there(packed, terms, document, names, cache, question)
    devices = _devices(names, terms, packed, document)
    judged = [_judged(packed, terms, chosen, cache, question) for chosen in devices]
    verdicts, estimates, measured = zip(*judged, strict=True)
    return Checked(path, verdicts, estimates, any(measured), question.estimate_only)


def _checked_there(
    packed: Packed, terms: Terms, document: TomlDocument, names: Sequence[str], cache: Cache, question: Question
) -> Checked:
    """The check on a device that is reached; `names` is the profile that it is declared to be."""
    from llmpack.pipeline.remote import reached

    if len(set(names)) > 1:
        raise UsageError(f"--on reaches one device and {', '.join(names)} are named; say which with --device")
    profile = None if names[0] == HOST else device(names[0])
    assert question.on is not None
    with reached(question.on, cache) as there:
        chosen = there.as_declared(profile)
        wrong = [placed(one, document) for one in terms.budget.problems(chosen, packed.outline.context)]
        if wrong:
            raise RecipeError(wrong)
        verdict, guess, measured = _judged(packed, terms, chosen, cache, question, there)
    return Checked(packed.path, (verdict,), (guess,), measured, False, there.station.name)


def _devices(names: Sequence[str], terms: Terms, packed: Packed, document: TomlDocument) -> list[Device]:
    """The devices of these names. Raises RecipeError with everything that is wrong about them and the budget."""
    found: list[Device] = []
    problems: list[Problem] = []
    foreign = foreign_to_llama if packed.outline.in_llama else foreign_to_transformers
    for problem in foreign(terms.runtime):
        problems.append(placed(replace(problem, path=f"runtime.{problem.path}"), document))
    for name in dict.fromkeys(names):
        try:
            found.append(device(name))
        except RecipeError as error:
            problems += error.problems
        else:
            wrong = terms.budget.problems(found[-1], packed.outline.context)
            problems += [placed(problem, document) for problem in wrong]
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    return found


def _judged(
    packed: Packed, terms: Terms, chosen: Device, cache: Cache, question: Question, there: Reached | None = None
) -> tuple[Verdict, Estimate, bool]:
    """The verdict for one device, the estimate, and whether something was measured; `there` if it was reached."""
    context = terms.budget.context
    findings = [finding for finding in packed.findings if _still_holds(finding, packed, terms, chosen)]
    known = {finding.limit for finding in findings if finding.usable}
    wanted = MEASURED_LIMITS & terms.budget.limits.keys()
    measured = False
    within_reach = there is not None or (not question.estimate_only and is_this_machine(chosen))
    if within_reach and not wanted <= known:
        findings += _measured(packed, terms, chosen, cache, question, there)
        measured = True
    findings.append(_disk(packed, chosen))
    guess = estimate(packed.outline, terms.runtime, chosen, context)
    projected = [found for found in _projected(packed, terms, chosen) if _helps(found, guess, chosen)]
    verdict = judge(
        terms.budget,
        (*guess.findings(packed.sha256), *projected, *findings),
        chosen,
        accept=terms.target.accept,
        cure=cures(packed.outline, terms.runtime, chosen, context),
        missing={**guess.missing, **_no_quality(packed, question)},
    )
    return verdict, guess, measured


def _measured(
    packed: Packed, terms: Terms, chosen: Device, cache: Cache, question: Question, there: Reached | None
) -> list[Finding]:
    """What only a run can answer of what is asked."""
    from llmpack.pipeline.evidence import measurement

    wanted = MEASURED_LIMITS & terms.budget.limits.keys()
    subject, context, cap = packed.subject(terms.runtime), terms.budget.context, terms.budget.memory
    protocol = MEMORY_ALONE if wanted == {"memory"} else question.protocol
    if there is not None:
        found = there.measurement(subject, context, cache, cap, protocol)
    else:
        require_processor(terms.runtime)
        found = measurement(subject, chosen, context, cache, cap=cap, protocol=protocol)
    return [finding for finding in found.findings if finding.limit in wanted]


def _still_holds(finding: Finding, packed: Packed, terms: Terms, chosen: Device) -> bool:
    """Whether a figure that was found when the bundle was made says something about this question."""
    if finding.limit == "disk":
        return False  # looked at again, since that costs nothing
    if finding.limit not in MEASURED_LIMITS:
        return _same_settings(finding, terms, ("kv", "flash_attention", "batch", "ubatch", "processor"))
    if not _same_run(finding, terms) or finding.evidence.device != chosen.fingerprint:
        return False
    from llmpack.pipeline.keys import installed
    from llmpack.runtime.runners import runtime_for

    made_with = packed.manifest.made["versions"] if packed.manifest else {}
    now = {name: installed(name) for name in runtime_for(packed.model.path).packages}
    return not is_this_machine(chosen) or all(v is None or v == made_with.get(name) for name, v in now.items())


def _same_settings(finding: Finding, terms: Terms, names: Sequence[str]) -> bool:
    then, now = {"processor": "cpu", **finding.evidence.settings}, terms.runtime.model_dump(mode="json")
    return all(then.get(name) == now[name] for name in names)


def _same_run(finding: Finding, terms: Terms) -> bool:
    """Whether a figure of speed or memory was found under the settings and the context that are asked about."""
    names = ["kv", "flash_attention", "batch", "ubatch", "load", "processor"]
    if terms.runtime.threads is not None:
        names.append("threads")
    return _same_settings(finding, terms, names) and finding.evidence.settings.get("context") == terms.budget.context


def _projected(packed: Packed, terms: Terms, chosen: Device) -> list[Finding]:
    """What was measured here when the bundle was made, projected onto a device that is out of reach."""
    asked = {"decode", "prefill", "first_token"} & terms.budget.limits.keys()
    found = [f for f in packed.findings if f.limit in asked and _same_run(f, terms)]
    if not found or is_this_machine(chosen):
        return []
    here = probe_host(rates=True) if any(f.evidence.device == probe_host().fingerprint for f in found) else None
    return project(found, here, chosen) if here else []


def _helps(finding: Finding, guess: Estimate, chosen: Device) -> bool:
    """Whether a projection says more than the estimate from shapes: that has no figure, or assumes an efficiency."""
    assumed = finding.limit == "decode" and chosen.figures.decode_efficiency is None and Rates.of(chosen) is None
    return finding.limit in guess.missing or assumed


def _no_quality(packed: Packed, question: Question) -> dict[str, str]:
    """Why there may be no figures of quality."""
    if packed.manifest is None:
        kind = "file" if packed.path.is_file() else "folder"
        text = f"a {kind} alone does not tell which model it was made from; check a bundle, which does"
    elif question.estimate_only:
        text = "only the header was read"
    else:
        text = "this bundle was not compared with its source under these settings"
    return dict.fromkeys(("quality.kl", "quality.kl_p99", "quality.top1", "quality.ppl_ratio"), text)


def _disk(packed: Packed, chosen: Device) -> Finding:
    evidence = Evidence(
        kind="measurement", artifact=packed.sha256, device=chosen.fingerprint, machine=chosen.description
    )
    return Finding(limit="disk", value=packed.disk, best=packed.disk, evidence=evidence, reason="in blocks of 4 KiB")
