"""Independent pieces of one computation, a core each.

Elementwise work in pieces that a core's cache holds gains little from torch's own threads: each operation would wait
for the slowest of them. A thread per piece, computing by itself, waits once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from llmpack.allocator import share_heap

if TYPE_CHECKING:
    import torch
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

Piece = TypeVar("Piece")
Result = TypeVar("Result")


AT_ONCE = 2
"""Pieces that are computed at the same time, each with its share of torch's threads. Python serves one thread at a
time: more of them would wait for it, and take memory."""


def each(function: Callable[[Piece], Result], pieces: Sequence[Piece]) -> list[Result]:
    """``function(piece)`` of every piece, in their order.

    The caller's mode of inference holds inside. One piece alone runs where the caller is, with all threads. The first
    error is raised, and pieces that were not begun are left.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(pieces) < 2:
        return [function(piece) for piece in pieces]
    inference = torch.is_inference_mode_enabled()

    def apart(piece: Piece) -> Result:
        torch.set_num_threads(threads // AT_ONCE)
        with torch.inference_mode(inference):
            return function(piece)

    share_heap()
    from concurrent.futures import ThreadPoolExecutor  # not before it is needed: a plan computes nothing

    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        return list(pool.map(apart, pieces))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # what threads start with that torch has not seen yet


def even(count: int, most: int, least: int | None = None) -> list[slice]:
    """`count` rows in even runs of at most `most`; enough for all threads where none gets under `least`, if given."""
    runs = max(1, -(-count // most))
    if least is not None and torch.get_num_threads() > 1:
        runs = max(runs, min(AT_ONCE, count // max(1, least)))
    length = max(1, -(-count // runs))
    return [slice(start, min(start + length, count)) for start in range(0, count, length)]
