"""Scales adjusted after rounding: codes held, the full Hessian as the measure.

For one row the error is quadratic in its scales (and offsets): with ``e = w - P p``, where column j of P holds the
multiples of group j and zeros elsewhere, ``e H e^T`` has curvature ``N = P^T H P`` and half its negative gradient is
``g = P^T H e``. Coordinates are moved in turn, each to the storable value nearest to its optimum given all others, so
the error never grows and rounding to the file's precision is part of the descent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmpack.encodings.search import quotient, to_half

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

SWEEPS = 16


class Descent:
    """The error of a few rows as a function of their parameters: scales, then offsets if there are any.

    q       [rows, columns] multiples that the codes stand for
    error   [rows, columns] present ``W - Q``
    H       [columns, columns]
    found   [rows, parameters], starts as `parameters`
    """

    def __init__(self, q: Tensor, error: Tensor, H: Tensor, group: int, parameters: Tensor) -> None:
        groups = q.shape[1] // group
        with_offsets = parameters.shape[1] > groups
        self.found = parameters.clone()
        self.N = _curvature_with_offsets(q, H, group) if with_offsets else _curvature(q, H, group)
        pull = error @ H
        parts = [pull * q, pull] if with_offsets else [pull * q]
        self.g = torch.cat([part.reshape(q.shape[0], groups, group).sum(-1) for part in parts], dim=1)

    def wanted(self, j: int) -> Tensor:
        """[rows] the best value of parameter j, all others as they are."""
        return self.found[:, j] + quotient(self.g[:, j], self.N[:, j, j])

    def move(self, j: int, target: Tensor) -> bool:
        """Set parameter j; whether it changed anywhere."""
        step = target - self.found[:, j]
        if not bool(step.any()):
            return False
        self.found[:, j] = target
        self.g.addcmul_(self.N[:, j], step[:, None], value=-1)
        return True

    def stretch(self, some: slice, factor: Tensor) -> Tensor:
        """[rows] change of the error if these parameters were `factor` [rows] times as large."""
        step = self.found[:, some] * (factor - 1)[:, None]
        bend = torch.einsum("ri,rij,rj->r", step, self.N[:, some, some], step)
        return bend - 2 * (step * self.g[:, some]).sum(1)

    def best_stretch(self, some: slice) -> Tensor:
        """[rows] the factor of least error for these parameters together."""
        now = self.found[:, some]
        bend = torch.einsum("ri,rij,rj->r", now, self.N[:, some, some], now)
        return 1 + quotient((now * self.g[:, some]).sum(1), bend)


def descend_halves(descent: Descent) -> Tensor:
    """Parameters [rows, count] of lower error, all exact in float16."""
    for _ in range(SWEEPS):
        moved = [descent.move(j, to_half(descent.wanted(j))) for j in range(descent.found.shape[1])]
        if not any(moved):
            break
    return descent.found


def descend_integers(descent: Descent, units: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Units [rows, super-blocks] and integers [rows, parameters] of lower error; their products are the parameters.

    units  float32, exact in float16; equally many parameters in a row belong to each
    """
    units = units.clone()
    per = descent.found.shape[1] // units.shape[1]
    integers = quotient(descent.found, units.repeat_interleave(per, dim=1)).round_()
    for _ in range(SWEEPS):
        moved = False
        for j in range(integers.shape[1]):
            unit = units[:, j // per]
            whole = quotient(descent.wanted(j), unit).round_().clamp_(low, high)
            integers[:, j] = torch.where(unit == 0, integers[:, j], whole)
            moved |= descent.move(j, unit * integers[:, j])
        for s in range(units.shape[1]):
            moved |= _move_unit(descent, units, integers, s, per)
        if not moved:
            break
    return units, integers


def _move_unit(descent: Descent, units: Tensor, integers: Tensor, s: int, per: int) -> bool:
    """Bring one unit to the float16 nearest to its optimum, where that lowers the error."""
    some = slice(s * per, (s + 1) * per)
    now = units[:, s]
    target = to_half(now * descent.best_stretch(some))
    better = descent.stretch(some, quotient(target, now)) < 0
    target = torch.where(better & (now != 0), target, now)
    if torch.equal(target, now):
        return False
    units[:, s] = target
    for j in range(some.start, some.stop):
        descent.move(j, target * integers[:, j])
    return True


def _curvature(q: Tensor, H: Tensor, group: int) -> Tensor:
    """[rows, groups, groups]: ``P^T H P`` of each row."""
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


def _curvature_with_offsets(q: Tensor, H: Tensor, group: int) -> Tensor:
    """[rows, 2 groups, 2 groups]: curvature in scales (first half) and offsets (second half)."""
    rows, columns = q.shape
    count = columns // group
    N = q.new_empty(rows, 2 * count, 2 * count)
    N[:, :count, :count] = _curvature(q, H, group)
    summed = H.reshape(columns, count, group).sum(-1)
    for g in range(count):
        first = g * group
        cross = q[:, first : first + group] @ summed[first : first + group]
        N[:, g, count:] = cross
        N[:, count:, g] = cross
    N[:, count:, count:] = summed.reshape(count, group, count).sum(1)
    return N
