"""What is known about a model: found once, kept under what it depends on, judged as often as needed.

Kept evidence is used again for the same file, machine, runtime and settings, if it answers what is asked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpack.pipeline.cache import Cache
from llmpack.pipeline.keys import installed
from llmpack.runtime.runners import runtime_for
from llmpack.runtime.settings import RuntimeSettings
from llmpack.target.budget import MEASURED_LIMITS, Budget, Evidence, Finding
from llmpack.target.device import Device
from llmpack.target.measure import measure
from llmpack.target.protocol import STANDARD, Protocol
from llmpack.target.quality import (
    REFERENCE_VERSION,
    Reference,
    evaluate,
    fidelity,
    fidelity_problems,
    quality_findings,
)

if TYPE_CHECKING:
    from torch import Tensor

    from llmpack.algorithms.divergence import Divergence
    from llmpack.checkpoint.checkpoint import Checkpoint
    from llmpack.models.graph import ModelGraph

EVIDENCE = "evidence"
REFERENCE = "reference"


@dataclass(frozen=True)
class Found:
    """Figures with their evidence, and the full report that they are taken from."""

    findings: tuple[Finding, ...]
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Subject:
    """The model that evidence is about, a GGUF file or a model folder, and how it is run."""

    path: Path
    sha256: str
    settings: RuntimeSettings


def needs_measuring(budget: Budget) -> bool:
    """Whether some declared limit can only be answered by running the file."""
    return bool(MEASURED_LIMITS & budget.limits.keys())


def _runtime_facts(subject: Subject) -> dict[str, Any]:
    settings = {**subject.settings.model_dump(mode="json"), "threads": subject.settings.effective_threads}
    versions = {name: installed(name) for name in runtime_for(subject.path).packages}
    return {"artifact": subject.sha256, "settings": settings, **versions}


def kept(cache: Cache, facts: Mapping[str, Any]) -> Found | None:
    """What was found under these facts, if it was."""
    entry = cache.find(EVIDENCE, facts)
    if entry is None:
        return None
    findings = tuple(Finding.model_validate_json(json.dumps(values)) for values in entry.result["findings"])
    return Found(findings, entry.result["report"])


def keep(cache: Cache, facts: Mapping[str, Any], found: Found) -> None:
    """Keep what was found under the facts that it depends on."""
    result = {"findings": [f.model_dump(mode="json") for f in found.findings], "report": found.report}
    cache.remember(EVIDENCE, facts, result)


def measurement(
    subject: Subject,
    device: Device,
    context: int,
    cache: Cache,
    *,
    cap: int | None = None,
    protocol: Protocol = STANDARD,
    good: Callable[[Sequence[Finding]], bool] = lambda findings: True,
) -> Found:
    """Memory and speed on this machine, which is `device`.

    cap   bytes of memory that the process is held to: the budget, if it says so
    good  whether kept figures will do; if not (too noisy, or they broke a limit on a busy day) it is measured again

    One measurement at a time on a machine: others would disturb it. Raises RuntimeFailed.
    """
    facts = {
        "name": "measurement",
        **_runtime_facts(subject),
        "device": device.fingerprint,
        "context": context,
        "cap": cap,
        "protocol": asdict(protocol),
    }
    with cache.lock("measuring", "measuring on this machine"):
        known = kept(cache, facts)
        if known is not None and good(known.findings):
            return known
        measured = measure(
            subject.path,
            subject.settings,
            context,
            artifact=subject.sha256,
            cap=cap,
            protocol=protocol,
            progress=cache.progress,
        )
        found = Found(tuple(measured.findings()), measured.to_json())
        keep(cache, facts, found)
        return found


@dataclass(frozen=True)
class Original:
    """The model that quality is compared with, and the text it is compared on.

    digest  of the checkpoint
    text    digest of the tokens, and how to get them: they are read only if nothing was kept
    """

    checkpoint: Checkpoint
    graph: ModelGraph
    digest: str
    text: str
    tokens: Callable[[], Tensor]


def quality(subject: Subject, original: Original, device: Device, cache: Cache) -> Found:
    """Divergence of the file in its runtime from the original, token by token. `device` is this machine.

    Raises what `target.quality.evaluate` raises.
    """
    facts = {"name": "quality", **_runtime_facts(subject), "source": original.digest, "text": original.text}
    known = kept(cache, facts)
    if known is not None:
        return known
    reference_facts = {"version": REFERENCE_VERSION, "source": original.digest, "text": original.text}
    with cache.claim(REFERENCE, reference_facts, "the predictions of the source") as slot:
        reference = Reference.build(
            original.checkpoint, original.graph, original.tokens(), slot.content, cache.progress
        )
        if slot.entry is None:
            slot.finish({})
    found = evaluate(subject.path, reference, subject.settings, cache.progress)
    evidence = _evidence(subject, device)
    made = Found(tuple(quality_findings(found, evidence)), _report(found, original.text))
    keep(cache, facts, made)
    return made


def faithfulness(
    subject: Subject, checkpoint: Checkpoint, graph: ModelGraph, digest: str, tokens: Callable[[], Tensor], cache: Cache
) -> Divergence:
    """Divergence of the file in its runtime from its own decoded weights; kept only if there is nothing wrong with it.

    digest  of the checkpoint
    """
    from llmpack.algorithms.divergence import Divergence

    facts = {"name": "fidelity", **_runtime_facts(subject), "checkpoint": digest}
    entry = cache.find(EVIDENCE, facts)
    if entry is not None:
        return Divergence(**entry.result["report"])
    found = fidelity(subject.path, checkpoint, graph, tokens(), subject.settings, cache.progress)
    if not fidelity_problems(found):
        keep(cache, facts, Found((), asdict(found)))
    return found


def _report(found: Divergence, text: str) -> dict[str, Any]:
    return {"kind": "measurement", "text": text, **asdict(found)}


def _evidence(subject: Subject, device: Device) -> Evidence:
    with runtime_for(subject.path)() as runtime:
        build = runtime.info()
    return Evidence(
        kind="measurement",
        artifact=subject.sha256,
        device=device.fingerprint,
        machine=device.description,
        settings=subject.settings.model_dump(mode="json"),
        build=dict(build.versions),
    )
