"""Scales adjusted after rounding: codes held, the full Hessian as the measure.

For one row the error is quadratic in its scales and offsets. With ``e = w - value`` and a scale p whose columns have
the multiples v, ``e H e^T`` is least at ``p + (v . He) / (v H v)``; a scale and an offset of one group are solved for
together. Groups are moved in turn, each to the storable numbers nearest to that and only where the error falls, so
rounding to the file's precision is part of the descent. ``He`` is kept up to date within a run of columns, and for all
others when the run is done: a sweep costs one product with H, as GPTQ does.

Arrays lie column by column, [columns, rows].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from llmpack.encodings.search import quotient, to_half

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

SWEEPS = 4
RUN = 256
"""Columns whose parameters see each other's moves at once, a group at least; those of a super-block are among them."""

Store = Callable[["Tensor"], "Tensor"]


class Descent:
    """The error of a few rows as a function of their scales and offsets.

    q      [rows, columns] multiples that the codes stand for
    error  [rows, columns] present ``W - Q``
    H      [columns, columns]
    group  columns that share a scale
    """

    def __init__(self, q: Tensor, error: Tensor, H: Tensor, group: int) -> None:
        self.H, self.group = H, group
        self.q = q.T.contiguous()
        self.pull = H @ error.T

    def runs(self) -> Iterator[Run]:
        """Runs of columns, several times over; what one has moved reaches all others when the next is asked for."""
        columns, length = len(self.q), max(RUN, self.group)
        for sweep in range(SWEEPS):
            for start in range(0, columns, length):
                some = slice(start, min(start + length, columns))
                run = Run(self, some)
                yield run
                if sweep + 1 < SWEEPS and start:
                    self.pull[:start].addmm_(self.H[:start, some], run.growth, alpha=-1)
                self.pull[some.stop :].addmm_(self.H[some.stop :, some], run.growth, alpha=-1)


class Run:
    """Some columns; the others stay as they are.

    groups  which of the tensor's
    growth  [columns, rows] by how much values have grown
    """

    def __init__(self, descent: Descent, some: slice) -> None:
        self.group = descent.group
        self.groups = range(some.start // descent.group, some.stop // descent.group)
        self.growth = torch.zeros_like(descent.q[some])
        self._q, self._pull = descent.q[some], descent.pull[some]
        self._H = descent.H[some, some].contiguous()

    def _columns(self, group: int, count: int = 1) -> slice:
        first = (group - self.groups.start) * self.group
        return slice(first, first + count * self.group)

    def scale(self, group: int, now: Tensor, store: Store) -> Tensor:
        """[rows] the scale of a group moved from `now` to its best."""
        some = self._columns(group)
        return self._moved(some, self._q[some], now, store)

    def line(self, group: int, now: tuple[Tensor, Tensor], stores: tuple[Store, Store]) -> tuple[Tensor, Tensor]:
        """[rows] scale and offset of a group moved from `now` to their best together."""
        some = self._columns(group)
        q, pull, H = self._q[some], self._pull[some], self._H[some, some]
        sums = H.sum(1)
        a, b, c = (q * (H @ q)).sum(0), sums @ q, sums.sum()
        across, total = (q * pull).sum(0), pull.sum(0)
        determinant = a * c - b * b
        together = quotient(c * across - b * total, determinant)
        scale = stores[0](now[0] + torch.where(determinant > 1e-6 * a * c, together, quotient(across, a)))
        wider = scale - now[0]
        offset = stores[1](now[1] + quotient(total - b * wider, c))
        higher = offset - now[1]
        change = wider * (a * wider + 2 * b * higher - 2 * across) + higher * (c * higher - 2 * total)
        better = change < 0
        self._grow(some, torch.where(better, q * wider + higher, 0.0))
        return torch.where(better, scale, now[0]), torch.where(better, offset, now[1])

    def unit(self, first: int, parameters: Tensor, now: Tensor, *, offsets: bool) -> Tensor:
        """[rows] a unit moved from `now` to its best; `parameters` [groups, rows] from group `first` on are in it."""
        some = self._columns(first, len(parameters))
        values = parameters.repeat_interleave(self.group, dim=0)
        return self._moved(some, quotient(values if offsets else values * self._q[some], now), now, to_half)

    def _moved(self, some: slice, direction: Tensor, now: Tensor, store: Store) -> Tensor:
        bend = (direction * (self._H[some, some] @ direction)).sum(0)
        slope = (direction * self._pull[some]).sum(0)
        target = store(now + quotient(slope, bend))
        step = target - now
        better = step * (step * bend - 2 * slope) < 0
        self._grow(some, torch.where(better, direction * step, 0.0))
        return torch.where(better, target, now)

    def _grow(self, some: slice, growth: Tensor) -> None:
        self._pull.addmm_(self._H[:, some], growth, alpha=-1)
        self.growth[some] += growth


def descend_halves(descent: Descent, parts: list[Tensor]) -> list[Tensor]:
    """Scales [groups, rows], and offsets if there are any, of lower error and all exact in float16."""
    found = [part.clone() for part in parts]
    for run in descent.runs():
        for g in run.groups:
            if len(found) == 1:
                found[0][g] = run.scale(g, found[0][g], to_half)
            else:
                found[0][g], found[1][g] = run.line(g, (found[0][g], found[1][g]), (to_half, to_half))
    return found


def descend_integers(
    descent: Descent, units: list[Tensor], integers: list[Tensor], low: int, high: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Units [super-blocks, rows] and integers [groups, rows], for scales and then for offsets, of lower error.

    A parameter is its integer times the unit of its super-block; units are float32, exact in float16.
    """
    units, integers = [part.clone() for part in units], [part.clone() for part in integers]
    per = len(integers[0]) // len(units[0])

    for run in descent.runs():
        for g in run.groups:
            stored = [
                _Multiple(unit[g // per], whole[g], low, high) for unit, whole in zip(units, integers, strict=True)
            ]
            for whole, one, value in zip(integers, stored, _moved(run, g, stored), strict=True):
                whole[g] = one.integer(value)
        for s in range(run.groups.start // per, run.groups.stop // per):
            some = slice(s * per, (s + 1) * per)
            for part, (unit, whole) in enumerate(zip(units, integers, strict=True)):
                unit[s] = run.unit(s * per, whole[some] * unit[s], unit[s], offsets=part > 0)
    return units, integers


def _moved(run: Run, g: int, stored: Sequence[_Multiple]) -> tuple[Tensor, ...]:
    """The parameters of a group at their best."""
    if len(stored) == 1:
        return (run.scale(g, stored[0].value, stored[0].store),)
    first, second = stored
    return run.line(g, (first.value, second.value), (first.store, second.store))


class _Multiple:
    """Integers [rows] of units [rows]: what such a product may be. Where a unit is 0 nothing moves."""

    def __init__(self, unit: Tensor, whole: Tensor, low: int, high: int) -> None:
        self._unit, self._whole, self._ends = unit, whole, (low, high)
        self.value = unit * whole

    def integer(self, value: Tensor) -> Tensor:
        nearest = quotient(value, self._unit).round_().clamp_(*self._ends)
        return torch.where(self._unit == 0, self._whole, nearest)

    def store(self, wanted: Tensor) -> Tensor:
        return self.integer(wanted) * self._unit
