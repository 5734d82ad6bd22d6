"""A size that is aimed at, as limits on the weights: what each encoding of each tensor takes of each.

A step knows no format, device or budget; here, where all are known, its target becomes numbers, alignment and metadata
included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmpack.encodings import ENCODINGS
from llmpack.errors import Problem, RecipeError
from llmpack.formats.facts import Facts
from llmpack.formats.gguf import GgufFormat
from llmpack.formats.gguf_container import ALIGNMENT, padded
from llmpack.models.graph import ModelGraph, TensorSpec
from llmpack.pipeline.output import ModelFormat
from llmpack.runtime.settings import RuntimeSettings
from llmpack.steps.quantize_auto import Target
from llmpack.target.budget import Budget
from llmpack.target.device import Device
from llmpack.target.estimate import estimate, touched_bytes
from llmpack.target.memory_model import cache_bytes, weights_of
from llmpack.target.outline import Outline, Stored
from llmpack.target.speed_model import Rates, decode_seconds
from llmpack.units import format_rate

if TYPE_CHECKING:
    from llmpack.checkpoint.checkpoint import Checkpoint

PICO = 1e12


class FileSize:
    """Exact bytes of a model.

    The head of a GGUF file is as long whatever the encodings are, so it is made once for a model; the vocabulary in it,
    which is most of it, is the same for all models that steps make of one source.
    """

    def __init__(self, file_format: ModelFormat, checkpoint: Checkpoint, facts: Callable[[ModelGraph], Facts]) -> None:
        self._format, self._checkpoint, self._facts = file_format, checkpoint, facts
        self._known: tuple[ModelGraph, int] | None = None
        self._words: tuple[dict[str, Any], int] | None = None

    def __call__(self, graph: ModelGraph) -> int:
        """Bytes of the file, or the files, of a graph."""
        form = self._format
        if not isinstance(form, GgufFormat):
            return form.nbytes(graph, self._checkpoint, self._facts(graph))
        rows = sum(padded(spec.nbytes) for spec in form.encode_graph(graph).tensors)
        if self._known is None or self._known[0].config is not graph.config:
            self._known = (graph, self._whole(form, graph) - rows)
        return self._known[1] + rows

    def _whole(self, form: GgufFormat, graph: ModelGraph) -> int:
        tokens = {key: value for key, value in graph.config.items() if "token" in key or "vocab" in key}
        if self._words is None or self._words[0] != tokens:
            self._words = (tokens, form.vocabulary_bytes(graph, self._checkpoint))
        return form.nbytes(graph, self._checkpoint, self._facts(graph), self._words[1])


@dataclass(frozen=True)
class Setting:
    """What a target is measured by.

    size   of the model file
    small  bytes of the bundle beside it
    """

    budget: Budget
    runtime: RuntimeSettings
    devices: tuple[Device, ...]
    file_format: ModelFormat
    size: FileSize
    small: int


@dataclass(frozen=True)
class Limit:
    """One thing that the weights must keep.

    words  what it is, for people
    bound  most that the whole may take
    fixed  what it takes whatever is chosen
    cost   what a tensor takes in the encoding of its spec
    unit   of all three
    """

    words: str
    bound: int
    fixed: int
    cost: Callable[[TensorSpec], int]
    unit: str = "bytes"

    def used(self, specs: Sequence[TensorSpec]) -> int:
        """What the whole takes with these tensors chosen."""
        return self.fixed + sum(self.cost(spec) for spec in specs)


def limits_of(
    target: Target, setting: Setting, lower: ModelGraph, chosen: Sequence[TensorSpec], file: Limit
) -> list[Limit]:
    """What a target comes to.

    lower  a graph that the step may make, with the tensors `chosen` in it, from which the fixed parts are taken
    file   the model file as a limit, without a bound
    """
    if target.kind == "bytes":
        return [replace(file, bound=int(target.value))]
    if target.kind == "bits":
        graph = setting.file_format.encode_graph(lower)
        fixed = graph.nbytes - sum(spec.nbytes for spec in chosen)
        bound = int(target.value * graph.parameters / 8)
        return [Limit(f"{target.value:g} bits per weight", bound, fixed, lambda spec: spec.nbytes)]
    budget = setting.budget
    limits = []
    if budget.disk is not None:
        limits.append(replace(file, words="budget.disk", bound=budget.disk - setting.small))
    if budget.memory is not None:
        limits += [one for d in setting.devices for one in _memory(setting, d, lower, chosen, budget.memory)]
    if budget.decode is not None:
        limits += [one for d in setting.devices for one in _decode(setting, d, lower, chosen, budget.decode)]
    if not limits and (budget.memory is not None or budget.decode is not None):
        names = ", ".join(device.name for device in setting.devices)
        text = f"memory and speed cannot be estimated on {names}"
        raise RecipeError([Problem(f"{text}; set disk in [budget], or name a size", "target")])
    if not limits:
        text = '"budget" fills the limits of [budget]; set disk, memory or decode there, or name a size'
        raise RecipeError([Problem(text, "target")])
    return limits


def file_size(setting: Setting, lower: ModelGraph, chosen: Sequence[TensorSpec]) -> Limit:
    """The model file as a limit; its bound is what the file of `lower`, with the tensors `chosen` in it, takes."""
    whole = setting.size(lower)
    fixed = whole - sum(padded(spec.nbytes) for spec in chosen)
    return Limit("model file", whole, fixed, lambda spec: padded(spec.nbytes))


def most_bytes(limit: Limit, file: Limit, largest: Sequence[TensorSpec]) -> int:
    """Bytes that a model file cannot exceed without breaking a limit.

    largest  the tensors in their largest encodings
    """
    if limit.unit != file.unit or any(limit.cost(spec) < spec.nbytes for spec in largest):
        return file.used(largest)  # a limit that does not count the bytes of some tensors does not bound the file
    padding = 0 if limit.cost is file.cost else (ALIGNMENT - 1) * len(largest)
    return limit.bound - limit.fixed + file.fixed + padding


def _memory(
    setting: Setting, device: Device, lower: ModelGraph, chosen: Sequence[TensorSpec], bound: int
) -> list[Limit]:
    """The estimate may be wrong, so a mix must keep the limit even if it is; nothing where there is no estimate."""
    outline = Outline.of_graph(setting.file_format.encode_graph(lower))
    sets = device.instruction_sets or frozenset()
    found = estimate(outline, setting.runtime, device, setting.budget.context).memory
    if found is None:
        return []

    def cost(spec: TensorSpec) -> int:
        return weights_of(spec, sets, tied=outline.tied).resident(found.load)

    most = int(bound * found.total.value / found.total.high)
    fixed = int(found.total.value) - sum(map(cost, chosen))
    return [Limit(f"budget.memory on {device.name}", most, fixed, cost)]


def _decode(
    setting: Setting, device: Device, lower: ModelGraph, chosen: Sequence[TensorSpec], bound: float
) -> list[Limit]:
    """Time that reading the weights may take for each token; nothing where the device says too little.

    Where its kernels were timed, in picoseconds by encoding, and an encoding that was not timed takes more than there
    is; else in bytes, as decoding waits for memory.
    """
    outline = Outline.of_graph(setting.file_format.encode_graph(lower))
    context = setting.budget.context
    rates = Rates.of(device)
    if rates is not None:
        return _timed(setting, device, rates, outline, chosen, bound)
    speed = estimate(outline, setting.runtime, device, context).decode
    if speed is None:
        return []

    def cost(spec: TensorSpec) -> int:
        return spec.nbytes if outline.tied or spec.part != "embedding" else 0

    touched = touched_bytes(outline)
    cache = cache_bytes(outline, setting.runtime, context)
    most = int(speed.value * (touched + cache) / bound) - cache
    words = f"bytes read per token for {format_rate(bound)} on {device.name}"
    return [Limit(words, most, touched - sum(map(cost, chosen)), cost)]


def _timed(
    setting: Setting, device: Device, rates: Rates, outline: Outline, chosen: Sequence[TensorSpec], bound: float
) -> list[Limit]:
    known = replace(outline, tensors=tuple(_with_known_kernel(tensor, rates) for tensor in outline.tensors))
    if rates.lacks(known, setting.runtime):
        return []
    most = int(PICO / bound)
    rates = replace(rates, cache=0.0)  # what caches keep depends on the whole mix, and is counted as nothing

    def cost(spec: TensorSpec) -> int:
        if spec.part == "embedding" and not outline.tied:
            return 0
        kernel = rates.kernels.get(spec.encoding)
        return most + 1 if kernel is None else int(PICO * kernel.decode_seconds(spec.nbytes, spec.shape[-1]))

    timed = [replace(spec, encoding=_timed_like(spec.encoding, spec.shape[-1], rates)) for spec in chosen]
    whole = int(PICO * decode_seconds(known, setting.runtime, setting.budget.context, rates))
    words = f"time per token for {format_rate(bound)} on {device.name}"
    return [Limit(words, most, whole - sum(map(cost, timed)), cost, "picoseconds")]


def _timed_like(encoding: str, columns: int, rates: Rates) -> str:
    """The encoding if its kernel was timed, else another one of rows that long; itself where there is none."""
    names = [name for name in (encoding, *rates.kernels) if name in rates.kernels and name in ENCODINGS]
    return next((name for name in names if ENCODINGS.load(name)().problem(columns) is None), encoding)


def _with_known_kernel(tensor: Stored, rates: Rates) -> Stored:
    """A matrix in an encoding that was timed: what is fixed is found with it, what it takes is taken off again."""
    matrix = len(tensor.shape) > 1
    return tensor.encoded(_timed_like(tensor.encoding, tensor.shape[-1], rates)) if matrix else tensor
