"""How much memory a step takes on the machine that builds, moment by moment, from shapes alone.

A walk holds one block in float32, the second moments of its inputs, and what the computation of the moment needs. The
figures are resident memory of the process with mapped pages, as the system counts it. `BASE` and the working set of a
forward pass are measured (x86-64 Linux, torch 2.13, transformers 5.23); everything else follows from the code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmpack.algorithms.drift import HELD_EVERY, HELD_TOKENS, STRIP
from llmpack.algorithms.gptq import rows_at_once
from llmpack.algorithms.hessian import TILE
from llmpack.encodings.names import ORDERED_NAMES
from llmpack.encodings.tiles import TILE as SEARCHED
from llmpack.models.forward import BATCH_TOKENS
from llmpack.models.graph import ModelGraph, TensorSpec
from llmpack.parallel import AT_ONCE

MIB = 1 << 20
BASE = 600 * MIB
"""Interpreter, torch, transformers with the classes of a family, tokenizer, numba with its compiler (150 MiB), and what
their heaps keep."""
KEPT = 35 * MIB
"""What heaps keep, of that, in a walk over matrices; a walk over next to nothing does without."""
WIDTHS, INNER_WIDTHS = 3, 3
"""Hidden states, and inner states of a feed-forward part, that are alive at once while a batch runs through a block."""
SEARCH = 32
"""Bytes for each number whose scale is searched: eight arrays of them."""

KEPT_WIDTHS, KEPT_INNER_WIDTHS = 20, 7
"""The same while gradients pass through a block."""

BASE_PART = "programs and libraries"
RUNNING = "running a block and summing its inputs"


@dataclass(frozen=True)
class Part:
    """One thing that is in memory at a moment."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class Moment:
    """What is in memory at one moment of a step."""

    name: str
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """All of it."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class Batch:
    """The tokens that run through a block at once.

    length  of a sequence
    tokens  of all sequences of the batch
    whole   tokens of all batches together
    """

    length: int
    tokens: int
    whole: int

    @classmethod
    def of(cls, tokens: int, length: int) -> Batch:
        """The batch of a corpus of so many tokens."""
        count = max(1, tokens // length)
        return cls(length, min(max(1, BATCH_TOKENS // length), count) * length, count * length)


@dataclass(frozen=True)
class Walk:
    """What a step does at every block.

    factored   it rounds with a factor of the second moments; else each number by itself
    reference  the unchanged model runs beside, and moments between both are summed
    refined    codes are refined afterwards, under the second moments themselves
    tuned      scales and norms of the whole rounded block then follow gradients of its output
    """

    factored: bool
    reference: bool = False
    refined: bool = False
    tuned: bool = False


def walk_moments(graph: ModelGraph, target: ModelGraph, batch: Batch, walk: Walk) -> list[Moment]:
    """The moments of a walk that rounds every block; `target`: what the step makes of the graph."""
    moments = [Moment("embedding and head", (_base(), Part("rounded matrices", _outside(target)), _slab(target)))]
    for index in _kinds(graph):
        moments += _block_moments(graph, target, index, batch, walk)
    return moments


def plain_moments(target: ModelGraph) -> list[Moment]:
    """The moments of a step that rounds one matrix after the other and reads no text."""
    largest = max((spec.parameters for spec in target.tensors if spec.is_linear), default=0)
    block = max((sum(spec.nbytes for spec in target.block(i)) for i in _kinds(target)), default=0)
    return [
        Moment("embedding and head", (_base(), Part("rounded matrices", _outside(target)), _slab(target))),
        Moment(
            "rounding",
            (_base(), Part("one matrix and its codes", 8 * largest + _search(largest)), Part("rounded so far", block)),
        ),
    ]


def _kinds(graph: ModelGraph) -> list[int]:
    """A block of each shape and encoding."""
    found: dict[tuple[object, ...], int] = {}
    for index in range(graph.block_count):
        found.setdefault(tuple((spec.part, spec.shape, spec.encoding) for spec in graph.block(index)), index)
    return list(found.values())


def _base() -> Part:
    return Part(BASE_PART, BASE)


def _outside(target: ModelGraph) -> int:
    return sum(spec.nbytes for spec in target.outside)


def _slab(target: ModelGraph) -> Part:
    from llmpack.steps.blocks import SLAB

    largest = max((spec.parameters for spec in target.outside), default=0)
    return Part("rows being rounded", 12 * min(SLAB, largest) + _search(min(SLAB, largest)))


def _search(numbers: int) -> int:
    return SEARCH * min(numbers, AT_ONCE * SEARCHED)


def _block_moments(graph: ModelGraph, target: ModelGraph, index: int, batch: Batch, walk: Walk) -> Iterator[Moment]:
    groups = target.input_groups(index)
    widths = {name: specs[0].shape[1] for name, specs in groups.items()}
    fixed = (_base(), Part("weights of one block", 4 * sum(spec.parameters for spec in graph.block(index))))
    running = Part(f"a batch of {batch.tokens} tokens", working_set(graph, index, batch))
    kept = {name: _gathered(width, batch, walk) for name, width in widths.items()}
    product = 4 * TILE * max(widths.values())
    beside = Part("the same batch of both models", 8 * batch.tokens * sum(widths.values()) if walk.reference else 0)
    gathered = Part("second moments of its inputs", sum(kept.values()) + product)
    yield Moment(RUNNING, (*fixed, gathered, running, beside))
    left, rounded = sum(kept.values()) if walk.factored else 0, 0
    for name, specs in groups.items():
        left -= kept[name] if walk.factored else 0
        rest = (*fixed, Part("second moments of other inputs", left), Part("rounded so far", rounded))
        square = 4 * widths[name] ** 2
        if walk.factored:
            own = Part(f"second moments of {name}", kept[name])
            wide = Part("the same in float64, factored", 2 * square)
            factor = Part("the factor", square if walk.refined else 0)
            yield Moment(f"factorizing {name}", (*rest, own, wide, factor))
            if walk.reference:
                yield Moment(f"following {name}", (*rest, own, factor, Part("moved weights", _following(specs))))
        for same in _same_encoding(specs):
            held = Part(f"factor of {name}", square if walk.factored else 0)
            yield Moment(f"rounding {name}", (*rest, held, *_refining(square, walk), *_rounding(same, walk)))
        rounded += sum(spec.nbytes + (spec.parameters * 5 // 4 if walk.tuned else 0) for spec in specs)
    if walk.tuned:
        yield Moment("tuning a block", (*fixed, Part("rounded", rounded), *_tuning(graph, index, batch)))
    if walk.factored:
        yield Moment("running the rounded block", (*fixed, Part("rounded", rounded), running))


def _gathered(width: int, batch: Batch, walk: Walk) -> int:
    """Bytes of the sums over one input, and of the tokens that are kept to try a correction on."""
    tried = min(HELD_TOKENS, batch.whole // HELD_EVERY)
    return 4 * width**2 + (4 * width**2 + 8 * tried * width if walk.reference else 0)


def _following(specs: Sequence[TensorSpec]) -> int:
    """Weights, what is added to them, and strips of both on the way."""
    return 16 * sum(spec.parameters for spec in specs) + 12 * STRIP * specs[0].shape[1]


def _refining(square: int, walk: Walk) -> tuple[Part, ...]:
    return (Part("second moments, twice", 2 * square),) if walk.refined else ()


def _tuning(graph: ModelGraph, index: int, batch: Batch) -> tuple[Part, ...]:
    """Gradients pass through a block: what it computed on the way forward is kept; one matrix's gradient at a time."""
    specs = [spec for spec in graph.block(index) if spec.is_linear]
    width, inner = specs[0].shape[1], max(spec.shape[1] for spec in specs)
    kept = 4 * batch.tokens * (KEPT_WIDTHS * width + KEPT_INNER_WIDTHS * inner)
    return (
        Part(f"a batch of {batch.tokens} tokens, and what its gradients need", kept),
        Part("the gradient of a matrix", 8 * max(spec.parameters for spec in specs)),
    )


def _same_encoding(specs: Sequence[TensorSpec]) -> list[list[TensorSpec]]:
    by_name: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        by_name.setdefault(spec.encoding, []).append(spec)
    return list(by_name.values())


def _rounding(specs: list[TensorSpec], walk: Walk) -> tuple[Part, ...]:
    numbers = sum(spec.parameters for spec in specs)
    rows, columns = sum(spec.shape[0] for spec in specs), specs[0].shape[1]
    largest = max(spec.parameters for spec in specs)
    if not walk.factored:
        return (Part("one matrix and its codes", 8 * largest + _search(largest)),)
    tile = min(rows, AT_ONCE * rows_at_once(columns)) * columns
    ordered = 5 * largest if specs[0].encoding in ORDERED_NAMES else 0
    return (
        Part("matrices and their codes", 5 * numbers),
        Part("rows being rounded", max(_search(largest), 16 * tile, (9 if walk.refined else 5) * largest)),
        *((Part("the same, columns in the order of their groups", ordered),) if ordered else ()),
    )


def working_set(graph: ModelGraph, index: int, batch: Batch) -> int:
    """Bytes of activations while a batch runs through a block, in float32."""
    specs = [spec for spec in graph.block(index) if spec.is_linear]
    width = next(spec.shape[1] for spec in specs)
    inner = max(spec.shape[1] for spec in specs)
    nbytes = 4 * batch.tokens * (WIDTHS * width + INNER_WIDTHS * inner)
    if graph.config.get("attn_logit_softcapping"):  # attention with a cap keeps the matrix of all scores
        heads = int(graph.config["num_attention_heads"])
        nbytes += 3 * 4 * heads * batch.tokens * batch.length
    return nbytes
