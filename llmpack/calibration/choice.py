"""Which blocks to leave out: by what they do to hidden states, or by what the model says without them.

Blocks go in runs of `width`, the period of a family's pattern of windows (1 where all blocks are alike): a run of that
many neighbours may go anywhere without breaking the pattern.

What blocks do to hidden states is cheap, one pass, and misleads: on newer models the blocks that turn states least
are not those that matter least (reference: EvoPress, Sieberling et al. 2024, arXiv:2410.14649). Greedy search by KL
divergence leaves each run out in turn, keeps the choice that costs least, and measures all that are left again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from llmpack.algorithms.saliency import angular_distance, influence
from llmpack.calibration.ablation import Run, apply, embedded, without_each
from llmpack.calibration.gate import mean_kl
from llmpack.models.forward import Forward
from llmpack.progress import QUIET, Progress

if TYPE_CHECKING:
    from torch import Tensor


def runs_of(kept: Sequence[int], width: int) -> list[Run]:
    """All runs of `width` neighbours."""
    return [tuple(kept[at : at + width]) for at in range(len(kept) - width + 1)]


def scores(
    forward: Forward,
    tokens: Tensor,
    width: int,
    score: Callable[[Tensor, Tensor], float],
    progress: Progress = QUIET,
) -> dict[Run, float]:
    """`score` of the hidden states [N, T, D] before and after every run of `width` blocks.

    Memory: ``width + 1`` streams of hidden states.
    """
    found: dict[Run, float] = {}
    states = deque([embedded(forward, tokens)], maxlen=width + 1)
    count = forward.graph.block_count
    with progress.task("scoring blocks", count) as done:
        for index in range(count):
            states.append(apply(forward, forward.load_block(index), states[-1]))
            if index + 1 >= width:
                found[tuple(range(index + 1 - width, index + 1))] = score(states[0], states[-1])
            done(1)
    return found


def by_influence(forward: Forward, tokens: Tensor, count: int, width: int, progress: Progress = QUIET) -> list[int]:
    """The `count` blocks of the runs with the least influence that do not overlap."""
    dropped: list[int] = []
    for run, _ in sorted(scores(forward, tokens, width, influence, progress).items(), key=lambda item: item[1]):
        if len(dropped) < count and not set(run) & set(dropped):
            dropped += run
    return sorted(dropped)


def by_angle(forward: Forward, tokens: Tensor, count: int, progress: Progress = QUIET) -> list[int]:
    """The run of `count` neighbours over which hidden states turn least."""
    found = scores(forward, tokens, count, angular_distance, progress)
    return list(min(found.items(), key=lambda item: item[1])[0])


def cheapest_run(
    forward: Forward,
    source: tuple[Forward, Tensor],
    tokens: Tensor,
    dropped: Collection[int],
    width: int,
    progress: Progress = QUIET,
) -> tuple[Run, float]:
    """One round of greedy search: the run whose loss costs least, and the KL divergence without it, in nats.

    source   the model to compare with, and its final hidden states on `tokens`
    dropped  what earlier rounds took
    """
    kept = [index for index in range(forward.graph.block_count) if index not in dropped]
    candidates = without_each(
        forward, tokens, kept, runs_of(kept, width), progress, f"choosing block {len(dropped) + 1}"
    )
    found = mean_kl(source[0], source[1], forward, candidates)
    best = min(found, key=lambda run: found[run])
    return best, found[best]
