"""Estimate: memory and speed on a device, computed from shapes before anything is built.

decode   one token reads every weight and the KV cache once: bytes / (efficiency x bandwidth)
prefill  two operations per weight and token, and attention: operations / arithmetic rate

What a device profile does not say is not estimated. An Estimate is another type than a Measurement:
it can fail a budget, and passes one only where that is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmpack.models import family_of
from llmpack.models.graph import ModelGraph
from llmpack.models.tables import Sizes
from llmpack.runtime.settings import RuntimeSettings
from llmpack.target import memory_model as model
from llmpack.target.budget import Evidence, Finding, LimitName
from llmpack.target.device import Device

MEMORY_ERROR = 0.05
"""How wrong the estimate of memory may be, as a share; held by tests against the real runtime."""
USUAL_EFFICIENCY = 0.60
"""Share of the nominal bandwidth that decoding reaches on small ARM boards and x86 with one or two channels."""
MEASURED_EFFICIENCY = 0.80
"""The same where the bandwidth is not nominal but was streamed on the machine itself."""
SPEED_ERROR, ASSUMED_SPEED_ERROR = 0.20, 0.35
"""How wrong an estimate of speed may be where the device's efficiency was measured, and where it is assumed."""


@dataclass(frozen=True)
class Term:
    """One part of the memory, and why it has that size."""

    name: str
    nbytes: int
    why: str


@dataclass(frozen=True)
class Interval:
    """A figure and the ends of what it may be."""

    low: float
    value: float
    high: float

    @classmethod
    def around(cls, value: float, share: float) -> Interval:
        """`value`, wrong by at most `share` of it."""
        return cls(value * (1 - share), value, value * (1 + share))


@dataclass(frozen=True)
class Estimate:
    """What a model will take and give on a device.

    terms          the parts of `memory`
    memory         resident bytes at the full context with the load mode of the settings, as `top` shows them
    hard_memory    thereof bytes that cannot be taken back without slowing the model down
    other_load     the other load mode, and the resident bytes with it
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
    terms: tuple[Term, ...]
    memory: Interval
    hard_memory: int
    other_load: tuple[str, int]
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

        add("memory", self.memory.value, self.memory.low, "from shapes, settings and instruction sets")
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
            return None if value is None else {"low": value.low, "value": value.value, "high": value.high}

        return {
            "kind": "estimate",
            "device": self.device.name,
            "fingerprint": self.device.fingerprint,
            "settings": self.settings.model_dump(mode="json"),
            "context": self.context,
            "memory": interval(self.memory),
            "memory_terms": [{"name": t.name, "bytes": t.nbytes, "why": t.why} for t in self.terms],
            "hard_memory": self.hard_memory,
            "other_load": {"load": self.other_load[0], "memory": self.other_load[1]},
            "decode": interval(self.decode),
            "prefill": interval(self.prefill),
            "first_token": interval(self.first_token),
            "disk": self.disk,
            "missing": dict(self.missing),
            "assumptions": list(self.assumptions),
        }


def estimate(
    graph: ModelGraph, settings: RuntimeSettings, device: Device, context: int, *, disk: int | None = None
) -> Estimate:
    """The estimate of a model in GGUF on a device. Reads no tensor data and needs no torch.

    graph    as it stands in the file (vectors in f32, every matrix in the encoding that is written)
    context  tokens, as declared by the budget
    disk     exact bytes of the bundle, where they are known
    """
    sizes = family_of(graph.config).sizes(graph.config)
    sets = device.instruction_sets
    weights = model.weights(graph, sets or frozenset())
    load = effective_load(settings)
    terms = _terms(graph.config, settings, weights, load, context)
    memory = sum(term.nbytes for term in terms)
    other = "no-mmap" if load == "mmap" else "mmap"
    assumptions, missing = [], {}
    if sets is None:
        assumptions.append(f"the instruction sets of {device.name} are unknown: no repacked copies are counted")
    decode, note = _decode(graph, settings, device, context)
    if decode is None:
        missing["decode"] = note
    elif note:
        assumptions.append(note)
    prefill = _prefill(graph, sizes, device, context)
    if prefill is None:
        missing["prefill"] = missing["first_token"] = f"the arithmetic rate of {device.name} is unknown"
    missing["load"] = "the time to load is not estimated"
    return Estimate(
        device=device,
        settings=settings,
        context=context,
        terms=terms,
        memory=Interval.around(memory, MEMORY_ERROR),
        hard_memory=memory - (weights.replaced if load == "mmap" else 0),
        other_load=(other, memory - weights.resident(load) + weights.resident(other)),
        decode=decode,
        prefill=prefill,
        first_token=Interval(context / prefill.high, context / prefill.value, context / prefill.low)
        if prefill
        else None,
        disk=disk,
        missing=missing,
        assumptions=tuple(assumptions),
    )


def effective_load(settings: RuntimeSettings) -> str:
    """What "auto" comes to on a processor: llama.cpp maps the file."""
    return "mmap" if settings.load == "auto" else settings.load


def _terms(
    config: Mapping[str, Any], settings: RuntimeSettings, weights: model.Weights, load: str, context: int
) -> tuple[Term, ...]:
    sizes = family_of(config).sizes(config)
    mapped = load == "mmap"
    kept = weights.stored - (0 if mapped else weights.replaced)
    copied = "repacked for the processor's kernels" + (", beside the mapped originals" if mapped else "")
    tokens = model.cache_tokens(config, settings, context)
    seen = f"{max(tokens)}" if len({*tokens}) == 1 else f"{min(tokens)} to {max(tokens)}"
    return (
        Term("weights", kept, "pages of the mapped file" if mapped else "read into memory"),
        *([Term("repacked weights", weights.repacked, copied)] if weights.repacked else []),
        Term(
            "KV cache",
            model.cache_bytes(config, settings, context),
            f"2 x {sizes.blocks} blocks x {sizes.kv_heads} heads x {sizes.head_dim} x {seen} tokens in {settings.kv}",
        ),
        Term(
            "scratch", model.scratch_bytes(sizes, settings, context), f"activations of {settings.ubatch} tokens at once"
        ),
        Term("logits", 4 * sizes.vocab, f"{sizes.vocab} numbers in f32"),
        Term("runtime", model.base_bytes(sizes), "interpreter, libraries, tokenizer"),
    )


def _decode(graph: ModelGraph, settings: RuntimeSettings, device: Device, context: int) -> tuple[Interval | None, str]:
    """Tokens per second, and what was assumed; or None and why."""
    bandwidth = device.figures.bandwidth
    if bandwidth is None:
        return None, f"the bandwidth of {device.name} is unknown"
    touched = touched_bytes(graph) + model.cache_bytes(graph.config, settings, context)
    if device.figures.decode_efficiency:
        share, error, note = device.figures.decode_efficiency.value, SPEED_ERROR, ""
    else:
        share = MEASURED_EFFICIENCY if bandwidth.provenance == "measured" else USUAL_EFFICIENCY
        error, note = ASSUMED_SPEED_ERROR, f"decoding reaches {share:.0%} of the bandwidth of {device.name}"
    return Interval.around(share * bandwidth.value / touched, error), note


def touched_bytes(graph: ModelGraph) -> int:
    """Bytes of weights that one token reads: all, but only a row of an embedding that is not the head too."""
    tied = not any(spec.part == "output" for spec in graph.tensors)
    skipped = 0 if tied else sum(spec.nbytes for spec in graph.tensors if spec.part == "embedding")
    return graph.nbytes - skipped


def _prefill(graph: ModelGraph, sizes: Sizes, device: Device, context: int) -> Interval | None:
    arithmetic = device.figures.arithmetic
    if arithmetic is None:
        return None
    weights = sum(spec.parameters for spec in graph.tensors if spec.is_linear)
    attention = 2 * sizes.blocks * sizes.q_rows * context  # scores and values, half masked
    return Interval.around(arithmetic.value / (2 * weights + attention), SPEED_ERROR)


def _first_token(prefill: Interval | None, context: int) -> Interval | None:
    if prefill is None:
        return None
    return Interval(context / prefill.high, context / prefill.value, context / prefill.low)
