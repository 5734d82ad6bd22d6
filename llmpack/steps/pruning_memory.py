"""Memory that pruning and distillation take while they build: the large things alone, so at least this much."""

from __future__ import annotations

from llmpack.calibration.blockwise import STEP_TOKENS
from llmpack.calibration.gate import CHUNK
from llmpack.models.graph import ModelGraph
from llmpack.steps.host_memory import BASE, Batch, Moment, Part, working_set

LOGITS = 5
"""Copies of a chunk of logits, one of the source's, while two models are compared."""
FACTORS = 3
"""Square matrices in float64 while second moments are factored."""
SAVED_WIDTHS, SAVED_INNER = 8, 4
"""Hidden states, and inner states of a feed-forward part, that a block keeps of each token for its gradients."""


def _base(graph: ModelGraph) -> tuple[Part, ...]:
    block = 4 * sum(spec.parameters for spec in graph.block(0))
    return Part("programs and libraries", BASE), Part("weights of one block", block)


def _hidden(graph: ModelGraph) -> tuple[int, int]:
    """Rows and columns of the embedding."""
    rows, columns = next(spec for spec in graph.outside if spec.part == "embedding").shape
    return rows, columns


def _saved(graph: ModelGraph) -> int:
    """Numbers that a block keeps of a token for its gradients."""
    inner = next(spec.shape[1] for spec in graph.block(0) if spec.part == "ffn.down")
    return SAVED_WIDTHS * _hidden(graph)[1] + SAVED_INNER * inner


def comparing(graph: ModelGraph, streams: int, tokens: int) -> Moment:
    """Logits of `streams` models of so many tokens each, a chunk at a time."""
    vocabulary, hidden = _hidden(graph)
    states = Part(f"hidden states of {streams} models", 4 * streams * tokens * hidden)
    logits = Part("logits", 4 * LOGITS * min(CHUNK, tokens) * vocabulary)
    return Moment("comparing with the source", (*_base(graph), states, Part("head", 4 * vocabulary * hidden), logits))


def fitting(graph: ModelGraph, inputs: str, name: str, streams: int, batch: Batch) -> Moment:
    """Least squares on the second moments of one input, with `streams` of hidden states in memory."""
    width = graph.input_groups(0)[inputs][0].shape[1]
    states = Part("hidden states of the text", 4 * streams * batch.whole * _hidden(graph)[1])
    moments = Part("second moments", 4 * width**2 + 8 * FACTORS * width**2)
    return Moment(name, (*_base(graph), states, moments))


def learning_blocks(graph: ModelGraph, batch: Batch, count: int) -> Moment:
    """`count` blocks learn together from some sequences, both models' hidden states on disk."""
    tokens = max(1, STEP_TOKENS // batch.length) * batch.length
    count = min(count, graph.block_count)
    blocks = 4 * sum(spec.parameters for spec in graph.block(0)) * count
    parts = (
        Part("programs and libraries", BASE),
        Part(f"weights of {count} blocks", blocks),
        Part("their gradients, the optimizer's moments and their numbers before", 4 * blocks),
        Part("what they keep for gradients", 4 * tokens * _saved(graph) * count),
    )
    return Moment("learning block by block", parts)


def running(graph: ModelGraph, streams: int, tokens: int, batch: Batch) -> Moment:
    """A batch runs through a block while hidden states of `streams` models wait."""
    states = Part(f"hidden states of {streams} models", 4 * streams * tokens * _hidden(graph)[1])
    return Moment("running a block", (*_base(graph), states, Part("a batch", working_set(graph, 0, batch))))


def training(graph: ModelGraph, learning: int, batch: Batch, *, again: bool = False) -> Moment:
    """One sequence forward and back through the whole model, of which `learning` numbers learn.

    again  blocks keep what they see and compute the rest again for their gradients
    """
    vocabulary, hidden = _hidden(graph)
    kept = graph.block_count * hidden + _saved(graph) if again else graph.block_count * _saved(graph)
    saved = 4 * batch.length * kept
    parts = (
        Part("programs and libraries", BASE),
        Part("weights", 4 * graph.parameters),
        Part("gradients and the optimizer's moments", 12 * learning),
        Part("what blocks keep for gradients", saved),
        Part("logits", 4 * 3 * batch.length * vocabulary),
    )
    return Moment("training", parts)
