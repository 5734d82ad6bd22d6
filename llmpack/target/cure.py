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
from llmpack.models.graph import ModelGraph
from llmpack.runtime.settings import RuntimeSettings
from llmpack.target.budget import LimitName
from llmpack.target.device import Device
from llmpack.target.estimate import Interval, effective_load, estimate, touched_bytes
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
    graph: ModelGraph, settings: RuntimeSettings, device: Device, context: int
) -> Callable[[LimitName, float], str]:
    """The cures of a model on a device, for `target.budget.judge`; the graph is the file's.

    Memory and disk are cured by settings and encodings, speed of writing by fewer bytes. For the other
    limits no change is known whose effect can be computed, and the text is empty.
    """

    def cure(limit: LimitName, needed: float) -> str:
        show = format_rate if limit == "decode" else format_size
        found = [c for c in _changes(limit, graph, settings, device, context) if c.saving > 0]
        if not found:
            return ""
        enough = [c for c in found if c.saving >= needed]
        if enough:
            best = min(enough, key=lambda change: (change.rank, change.saving))
        else:
            best = max(found, key=lambda change: change.saving)
        verb = "gains" if limit == "decode" else "saves"
        short = "" if enough else "; that alone is not enough"
        return f"{best.words} {verb} {show(best.saving)}; need {show(needed)}{short}"

    return cure


def _changes(
    limit: LimitName, graph: ModelGraph, settings: RuntimeSettings, device: Device, context: int
) -> Iterator[Change]:
    if limit == "memory":
        now = estimate(graph, settings, device, context).memory.value
        for rank, words, changed in _settings(settings):
            yield Change(rank, words, now - estimate(graph, changed, device, context).memory.value)
        for rank, words, lighter in _encodings(graph):
            yield Change(rank, words, now - estimate(lighter, settings, device, context).memory.value)
    elif limit == "disk":
        for rank, words, lighter in _encodings(graph):
            yield Change(rank, words, graph.nbytes - lighter.nbytes)
    elif limit == "decode":
        before = estimate(graph, settings, device, context).decode
        if before is None:
            return
        for rank, words, lighter in _encodings(graph):
            if touched_bytes(lighter) < touched_bytes(graph):
                yield Change(rank, words, _gain(before, estimate(lighter, settings, device, context).decode))
        for rank, words, changed in _settings(settings):
            yield Change(rank, words, _gain(before, estimate(graph, changed, device, context).decode))


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


def _encodings(graph: ModelGraph) -> Iterator[tuple[int, str, ModelGraph]]:
    """The graph with the matrices of one part one encoding coarser, where their rows allow it."""
    for part in graph.parts:
        chosen = [s for s in graph.tensors if s.part == part and (s.is_linear or part in ENCODABLE)]
        for encoding in dict.fromkeys(spec.encoding for spec in chosen):
            names = frozenset(spec.name for spec in chosen if spec.encoding == encoding)
            coarser = _coarser(encoding, {graph[name].shape[-1] for name in names})
            if coarser is not None:
                rank = 3 + LADDER.index(coarser)  # the coarser the result, the more it costs
                yield rank, f"{part} {encoding} -> {coarser}", _encoded(graph, names, coarser)


def _coarser(encoding: str, columns: set[int]) -> str | None:
    """The next encoding on the ladder that holds rows of all these lengths."""
    bits = ENCODINGS.load(encoding)().bits_per_weight
    for name in LADDER:
        if name not in ENCODINGS:
            continue
        candidate = ENCODINGS.load(name)()
        if candidate.bits_per_weight < bits and not any(candidate.problem(length) for length in columns):
            return name
    return None


def _encoded(graph: ModelGraph, names: frozenset[str], encoding: str) -> ModelGraph:
    return graph.with_encodings(lambda spec: encoding if spec.name in names else spec.encoding)
