"""Scales adjusted after rounding: codes held, the full Hessian as the measure.

For one row the error is quadratic in its scales (and offsets): with ``e = w - P p``, where column j of P holds the
multiples of group j and zeros elsewhere, ``e H e^T`` has curvature ``N = P^T H P`` and half its negative gradient is
``g = P^T H e``. Coordinates are moved in turn, each to the storable value nearest to its optimum given all others, so
the error never grows and rounding to the file's precision is part of the descent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")


def curvature(q: Tensor, H: Tensor, group: int) -> Tensor:
    """[rows, groups, groups]: ``P^T H P`` of each row, for multiples q [rows, columns]."""
    rows, columns = q.shape
    count = columns // group
    N = q.new_empty(rows, count, count)
    for g in range(count):
        first = g * group
        pull = q[:, first : first + group] @ H[first : first + group, first:]
        part = pull.mul_(q[:, first:]).reshape(rows, count - g, group).sum(-1)
        N[:, g, g:] = part
        N[:, g:, g] = part
    return N


def offset_curvature(q: Tensor, H: Tensor, group: int) -> Tensor:
    """[rows, 2 groups, 2 groups]: curvature in scales (first half) and offsets (second half)."""
    rows, columns = q.shape
    count = columns // group
    N = q.new_empty(rows, 2 * count, 2 * count)
    N[:, :count, :count] = curvature(q, H, group)
    summed = H.reshape(columns, count, group).sum(-1)
    for g in range(count):
        first = g * group
        cross = q[:, first : first + group] @ summed[first : first + group]
        N[:, g, count:] = cross
        N[:, count:, g] = cross
    N[:, count:, count:] = summed.reshape(count, group, count).sum(1)
    return N


def gradient(error: Tensor, q: Tensor, H: Tensor, group: int, offsets: bool) -> Tensor:
    """[rows, groups] or, with offsets, [rows, 2 groups]: half the negative gradient at `error` [rows, columns]."""
    rows, columns = q.shape
    pull = error @ H
    by_scale = (pull * q).reshape(rows, columns // group, group).sum(-1)
    if not offsets:
        return by_scale
    return torch.cat([by_scale, pull.reshape(rows, columns // group, group).sum(-1)], dim=1)


SWEEPS = 4


def descend(start: Tensor, N: Tensor, g: Tensor, storable: Callable[[Tensor], Tensor]) -> Tensor:
    """Parameters [rows, count] near `start` with a lower error; `g` is overwritten.

    storable  the nearest value that the file can hold, for each entry; `start` consists of such values
    """
    found = start.clone()
    for _ in range(SWEEPS):
        moved = False
        for j in range(found.shape[1]):
            bend = N[:, j, j]
            target = found[:, j] + torch.where(bend > 0, g[:, j] / bend, torch.zeros_like(bend))
            target = storable(target)
            step = target - found[:, j]
            if bool(step.any()):
                found[:, j] = target
                g.addcmul_(N[:, j], step[:, None], value=-1)
                moved = True
        if not moved:
            break
    return found
