"""Estimate: memory and speed on a device, computed from shapes before anything is built.

decode   one token reads every weight and the KV cache once: bytes / (efficiency x bandwidth)
prefill  two operations per weight and token, and attention: operations / arithmetic rate

Where a profile has the rates of the runtime's kernels (`llmpack device probe --runtime`), speed follows from those
instead: see `target.speed_model`.

What a device profile does not say is not estimated. An Estimate is another type than a Measurement:
it can fail a budget, and passes one only where that is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llmpack.runtime.settings import RuntimeSettings
from llmpack.target import memory_model as model
from llmpack.target import transformers_memory
from llmpack.target.budget import Evidence, Finding, LimitName
from llmpack.target.device import Device
from llmpack.target.memory_model import Interval, MemoryEstimate
from llmpack.target.outline import NOT_ESTIMATED, SPEED_NOT_ESTIMATED, Outline
from llmpack.target.speed_model import DECODE_ERROR, PREFILL_ERROR, Rates, decode_seconds, prefill_seconds

USUAL_EFFICIENCY = 0.60
"""Share of the nominal bandwidth that decoding reaches on small ARM boards and x86 with one or two channels."""
MEASURED_EFFICIENCY = 0.80
"""The same where the bandwidth is not nominal but was streamed on the machine itself."""
LOAD_NOT_ESTIMATED = "the time to load is not estimated"
SPEED_ERROR, ASSUMED_SPEED_ERROR = 0.20, 0.35
"""How wrong an estimate of speed may be where the device's efficiency was measured, and where it is assumed."""


@dataclass(frozen=True)
class Estimate:
    """What a model will take and give on a device.

    memory         peak resident bytes, term by term; None where the architecture is not modelled
    decode         tokens per second at the full context, None where the device does not say enough
    prefill        tokens per second over a prompt of the full context, None likewise
    first_token    seconds from such a prompt to the first token, None likewise
    disk           bytes of the bundle, if they were given
    missing        by limit, why there is no figure
    assumptions    what was taken for granted
    """

    device: Device
    settings: RuntimeSettings
    context: int
    memory: MemoryEstimate | None
    decode: Interval | None
    prefill: Interval | None
    first_token: Interval | None
    disk: int | None
    missing: dict[str, str] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()

    def findings(self, artifact: str = "") -> list[Finding]:
        """The figures as evidence for a verdict; `artifact` is the digest of what they are about, if it exists."""
        evidence = Evidence(
            kind="estimate",
            artifact=artifact,
            device=self.device.fingerprint,
            machine=self.device.description,
            settings={**self.settings.model_dump(mode="json"), "context": self.context},
        )
        found: list[Finding] = []

        def add(limit: LimitName, value: float, best: float, reason: str) -> None:
            found.append(Finding(limit=limit, value=value, best=best, evidence=evidence, reason=reason))

        if self.memory:
            total = self.memory.total
            add("memory", total.value, total.low, "from shapes, settings and instruction sets")
        if self.disk is not None:
            add("disk", self.disk, self.disk, "bytes that will be written")
        if self.decode:
            add("decode", self.decode.value, self.decode.high, "bytes per token over bandwidth")
        if self.prefill:
            add("prefill", self.prefill.value, self.prefill.high, "operations over the arithmetic rate")
        if self.first_token:
            add("first_token", self.first_token.value, self.first_token.low, "prompt over the prefill rate")
        return found

    def to_json(self) -> dict[str, Any]:
        """JSON values for the manifest and for `llmpack plan --json`."""

        def interval(value: Interval | None) -> dict[str, float] | None:
            return None if value is None else value.to_json()

        return {
            "kind": "estimate",
            "device": self.device.name,
            "fingerprint": self.device.fingerprint,
            "settings": self.settings.model_dump(mode="json"),
            "context": self.context,
            "memory": self.memory.to_json() if self.memory else None,
            "decode": interval(self.decode),
            "prefill": interval(self.prefill),
            "first_token": interval(self.first_token),
            "disk": self.disk,
            "missing": dict(self.missing),
            "assumptions": list(self.assumptions),
        }


def estimate(
    outline: Outline, settings: RuntimeSettings, device: Device, context: int, *, disk: int | None = None
) -> Estimate:
    """The estimate of a model on a device. Reads no tensor data and needs no torch.

    outline  of the file as it stands (of GGUF: vectors in f32, every matrix in the encoding that is written)
    context  tokens, as declared by the budget
    disk     exact bytes of the bundle, where they are known
    """
    if not outline.in_llama:
        return _in_transformers(outline, settings, device, context, disk)
    sets = device.instruction_sets
    assumptions, missing = [], {}
    memory = None
    if outline.unmodelled:
        missing["memory"] = outline.unmodelled
    else:
        memory = model.memory(outline, settings, sets or frozenset(), context)
        if sets is None:
            assumptions.append(f"the instruction sets of {device.name} are unknown: no repacked copies are counted")
        if not outline.verified:
            text = f"the memory of {outline.architecture} was never compared with llama.cpp"
            assumptions.append(f"{text}; up to {model.UNVERIFIED_ERROR:.0%} off")
    decode, note = _decode(outline, settings, device, context)
    if decode is None:
        missing["decode"] = note
    elif note:
        assumptions.append(note)
    prefill, note = _prefill(outline, settings, device, context)
    if prefill is None:
        missing["prefill"] = missing["first_token"] = note
    missing["load"] = LOAD_NOT_ESTIMATED
    return Estimate(
        device=device,
        settings=settings,
        context=context,
        memory=memory,
        decode=decode,
        prefill=prefill,
        first_token=_first_token(prefill, context),
        disk=disk,
        missing=missing,
        assumptions=tuple(assumptions),
    )


def _in_transformers(
    outline: Outline, settings: RuntimeSettings, device: Device, context: int, disk: int | None
) -> Estimate:
    memory = transformers_memory.memory(outline, settings, context)
    missing = dict.fromkeys(("decode", "prefill", "first_token"), SPEED_NOT_ESTIMATED)
    return Estimate(
        device=device,
        settings=settings,
        context=context,
        memory=memory,
        decode=None,
        prefill=None,
        first_token=None,
        disk=disk,
        missing=({} if memory else {"memory": NOT_ESTIMATED}) | missing | {"load": LOAD_NOT_ESTIMATED},
    )


def _decode(outline: Outline, settings: RuntimeSettings, device: Device, context: int) -> tuple[Interval | None, str]:
    """Tokens per second, and what was assumed; or None and why."""
    if outline.unmodelled and not any(kept.numbers for kept in outline.kept):
        return None, outline.unmodelled
    rates = Rates.of(device)
    if rates is not None:
        reason = rates.lacks(outline, settings)
        if reason:
            return None, f"{reason} on {device.name}"
        return Interval.around(1 / decode_seconds(outline, settings, context, rates), DECODE_ERROR), ""
    bandwidth = device.figures.bandwidth
    if bandwidth is None:
        return None, f"the bandwidth of {device.name} is unknown"
    touched = touched_bytes(outline) + model.cache_bytes(outline, settings, context)
    if device.figures.decode_efficiency:
        share, error, note = device.figures.decode_efficiency.value, SPEED_ERROR, ""
    else:
        share = MEASURED_EFFICIENCY if bandwidth.provenance == "measured" else USUAL_EFFICIENCY
        error, note = ASSUMED_SPEED_ERROR, f"decoding reaches {share:.0%} of the bandwidth of {device.name}"
    return Interval.around(share * bandwidth.value / touched, error), note


def touched_bytes(outline: Outline) -> int:
    """Bytes of weights that one token reads: all, but only a row of an embedding that is not the head too, and of
    experts those that are asked."""
    read = (t for t in outline.tensors if outline.tied or t.part != "embedding")
    return int(sum(t.nbytes * t.share for t in read))


def _prefill(outline: Outline, settings: RuntimeSettings, device: Device, context: int) -> tuple[Interval | None, str]:
    """Tokens per second; or None and why."""
    if outline.unmodelled and not any(kept.numbers for kept in outline.kept):
        return None, outline.unmodelled
    rates = Rates.of(device)
    if rates is not None:
        reason = rates.lacks(outline, settings)
        if reason:
            return None, f"{reason} on {device.name}"
        return Interval.around(context / prefill_seconds(outline, settings, context, rates), PREFILL_ERROR), ""
    arithmetic = device.figures.arithmetic
    if arithmetic is None:
        return None, f"the arithmetic rate of {device.name} is unknown"
    weights = sum(t.parameters * t.share for t in outline.tensors if t.is_linear)
    attention = 2 * outline.blocks * outline.head_rows * context  # scores and values, half masked
    return Interval.around(arithmetic.value / (2 * weights + attention), SPEED_ERROR), ""


def _first_token(prefill: Interval | None, context: int) -> Interval | None:
    if prefill is None:
        return None
    return Interval(context / prefill.high, context / prefill.value, context / prefill.low)
