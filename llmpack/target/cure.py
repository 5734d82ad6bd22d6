"""The cheapest known change that would keep a limit: settings that lose nothing, then coarser encodings.

Candidates are ranked by what they cost the model: a load mode and smaller batches cost it nothing, a
KV cache in 8 bits next to nothing, then each part's matrices one encoding coarser. Within a rank, the
one that saves least of those that save enough is named; if none alone does, the one that saves most.
The arithmetic is the memory model's, not a measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llmpack.encodings import ENCODINGS
from llmpack.runtime.settings import RuntimeSettings
from llmpack.target.budget import LimitName
from llmpack.target.device import Device
from llmpack.target.estimate import estimate, touched_bytes
from llmpack.target.memory_model import Interval, effective_load, memory
from llmpack.target.outline import Outline, Stored
from llmpack.units import format_rate, format_size

LADDER = ("f32", "f16", "q8_0", "q6_k", "q5_1", "q5_k", "iq4_nl", "q3_k")
"""Encodings from fine to coarse: of those with fewer bits than a tensor has, the first that its rows allow is next."""
ENCODABLE = ("embedding", "output")
SMALL_BATCH = 128


@dataclass(frozen=True)
class Change:
    """One change and what it saves.

    rank    what it costs the model, smaller first
    words   as the recipe would say it
    saving  in the unit of the limit: bytes, or tokens per second
    """

    rank: int
    words: str
    saving: float


def cures(
    outline: Outline, settings: RuntimeSettings, device: Device, context: int
) -> Callable[[LimitName, float], str]:
    """The cures of a model on a device, for `target.budget.judge`; the outline is the file's.

    Memory and disk are cured by settings and encodings, speed of writing by fewer bytes. For the other
    limits, and for what llama.cpp does not run, no change is known whose effect can be computed: the text is empty.
    """

    def cure(limit: LimitName, needed: float) -> str:
        if not outline.in_llama:
            return ""
        show = format_rate if limit == "decode" else format_size
        found = [c for c in _changes(limit, outline, settings, device, context) if c.saving > 0]
        if not found:
            return ""
        enough = [c for c in found if c.saving >= needed]
        if enough:
            best = min(enough, key=lambda change: (change.rank, change.saving))
        else:
            best = max(found, key=lambda change: change.saving)
        miss, verb = ("short", "gains") if limit == "decode" else ("over", "saves")
        rest = "" if enough else "; that alone is not enough"
        return f"{miss} by {show(needed)}: {best.words} {verb} {show(best.saving)}{rest}"

    return cure


def _changes(
    limit: LimitName, outline: Outline, settings: RuntimeSettings, device: Device, context: int
) -> Iterator[Change]:
    if limit == "memory":
        if outline.unmodelled:
            return
        sets = device.instruction_sets or frozenset()

        def total(changed: Outline, options: RuntimeSettings) -> float:
            return memory(changed, options, sets, context).total.value

        now = total(outline, settings)
        for rank, words, options in _settings(settings):
            yield Change(rank, words, now - total(outline, options))
        for rank, words, lighter in _encodings(outline):
            yield Change(rank, words, now - total(lighter, settings))
    elif limit == "disk":
        for rank, words, lighter in _encodings(outline):
            yield Change(rank, words, outline.nbytes - lighter.nbytes)
    elif limit == "decode":
        before = estimate(outline, settings, device, context).decode
        if before is None:
            return
        for rank, words, lighter in _encodings(outline):
            if touched_bytes(lighter) < touched_bytes(outline):
                yield Change(rank, words, _gain(before, estimate(lighter, settings, device, context).decode))
        for rank, words, changed in _settings(settings):
            yield Change(rank, words, _gain(before, estimate(outline, changed, device, context).decode))


def _gain(before: Interval, after: Interval | None) -> float:
    return 0.0 if after is None else after.value - before.value


def _settings(settings: RuntimeSettings) -> Iterator[tuple[int, str, RuntimeSettings]]:
    """Other settings, in the order of what they cost."""
    if effective_load(settings) == "mmap":
        yield 0, 'load = "no-mmap"', settings.model_copy(update={"load": "no-mmap"})
    if settings.ubatch > SMALL_BATCH:
        yield 1, f"ubatch = {SMALL_BATCH}", settings.model_copy(update={"ubatch": SMALL_BATCH})
    if settings.kv == "f16" and settings.flash_attention != "off":
        yield 2, 'kv = "q8_0"', settings.model_copy(update={"kv": "q8_0"})


def _encodings(outline: Outline) -> Iterator[tuple[int, str, Outline]]:
    """The model with the matrices of one part one encoding coarser, where their rows allow it."""
    for part in outline.parts:
        chosen = [t for t in outline.tensors if t.part == part and (t.is_linear or part in ENCODABLE)]
        for encoding in dict.fromkeys(tensor.encoding for tensor in chosen):
            alike = [tensor for tensor in chosen if tensor.encoding == encoding]
            coarser = _coarser(alike)
            if coarser is not None:
                rank = 3 + LADDER.index(coarser)  # the coarser the result, the more it costs
                yield rank, f"{part} {encoding} -> {coarser}", _encoded(outline, alike, coarser)


def _coarser(alike: list[Stored]) -> str | None:
    """The next encoding on the ladder that holds rows of all these tensors, which have one encoding."""
    bits = 8 * alike[0].nbytes / alike[0].parameters
    columns = {tensor.shape[-1] for tensor in alike}
    for name in LADDER:
        if name not in ENCODINGS:
            continue
        candidate = ENCODINGS.load(name)()
        if candidate.bits_per_weight < bits and not any(candidate.problem(length) for length in columns):
            return name
    return None


def _encoded(outline: Outline, alike: list[Stored], encoding: str) -> Outline:
    names = {tensor.name for tensor in alike}
    return outline.with_encodings(lambda tensor: encoding if tensor.name in names else tensor.encoding)
