"""The model without some of its blocks, on the same text: many such models in one pass over the blocks.

A model that lacks blocks i to j agrees with the whole one up to block i, so its stream of hidden states begins there,
as a copy. Each block is loaded once and runs on every stream that has it: for L blocks, and each of them left out in
turn, that is L (L + 1) / 2 runs of a block where whole models would take L^2, and L blocks read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from llmpack.models.forward import Block, Forward, batches
from llmpack.progress import QUIET, Progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

Run = tuple[int, ...]
"""Indexes of blocks that are left out together."""


def load_changed(forward: Forward, index: int, changed: Mapping[str, Tensor]) -> Block:
    """A block with other numbers in some of its tensors, by name."""
    block = forward.load_block(index)
    for spec in forward.graph.block(index):
        if spec.name in changed:
            block.module.get_parameter(forward.module_path(spec)).copy_(changed[spec.name])
    return block


def apply(forward: Forward, block: Block, hidden: Tensor) -> Tensor:
    """Hidden states [N, T, D] float32 after a block, a batch at a time."""
    after = torch.empty_like(hidden)
    for part in batches(*hidden.shape[:2]):
        after[part] = forward.run(block, hidden[part]).float().cpu()
    return after


def embedded(forward: Forward, tokens: Tensor) -> Tensor:
    """Hidden states [N, T, D] float32 before the first block."""
    return torch.cat([forward.embed(tokens[part]).float().cpu() for part in batches(*tokens.shape)])


def finished(forward: Forward, hidden: Tensor) -> Tensor:
    """Hidden states [N, T, D] float32 after the last norm."""
    return torch.cat([forward.finish(hidden[part]).float().cpu() for part in batches(*hidden.shape[:2])])


def without_each(
    forward: Forward,
    tokens: Tensor,
    kept: Sequence[int],
    runs: Collection[Run],
    progress: Progress = QUIET,
    title: str = "leaving out blocks",
) -> dict[Run, Tensor]:
    """Final hidden states [N, T, D] float32, after the last norm, of the model without each of `runs`.

    kept  the blocks of the model, ascending; a run is some neighbours among them
    runs  may hold the empty run: the model as it is

    Memory: one stream of hidden states for every run, and one block.
    """
    base = embedded(forward, tokens)
    streams: dict[Run, Tensor] = {}
    starting = {run[0]: run for run in runs if run}
    with progress.task(title, len(kept)) as done:
        for index in kept:
            block = forward.load_block(index)
            for run, hidden in streams.items():
                if index not in run:
                    streams[run] = apply(forward, block, hidden)
            if index in starting:
                streams[starting[index]] = base
            base = apply(forward, block, base)
            done(1)
    found = {run: finished(forward, streams[run]) for run in runs if run}
    return {(): finished(forward, base)} | found if () in runs else found


def changed_model(
    forward: Forward, tokens: Tensor, kept: Sequence[int], changed: Mapping[str, Tensor], progress: Progress = QUIET
) -> Tensor:
    """Final hidden states [N, T, D] float32 of the blocks `kept` with other numbers in some tensors, by name."""
    hidden = embedded(forward, tokens)
    with progress.task("measuring", len(kept)) as done:
        for index in kept:
            hidden = apply(forward, load_changed(forward, index, changed), hidden)
            done(1)
    return finished(forward, hidden)
