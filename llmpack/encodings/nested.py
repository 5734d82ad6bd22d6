"""Scales of super-blocks: groups share a float16 unit, of which each has an integer multiple (and one for its minimum).

The search has three stages. Every group by itself first, as if its scale were free. Then the units: the scales just
found are themselves numbers to be rounded, weighted by how much each matters. Then the truth: integers are moved to
their neighbours and units to their least squares wherever the error under everything as stored gets smaller.

Arrays over groups are [n] with the groups of a super-block next to each other; over super-blocks [n / per].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmpack.encodings.search import Groups, affine, exactly, fold, pick, quotient, symmetric, to_half, to_unit
from llmpack.encodings.steps import Steps

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

WINDOW = (1, -1, 2, -2)
MOVES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1))
INTEGER_SWEEPS = 2


@dataclass(frozen=True)
class Found:
    """Units [n / per], integers of groups [n] (float32, whole), and the error of each super-block [n / per]."""

    units: tuple[Tensor, ...]
    integers: tuple[Tensor, ...]
    error: Tensor

    def or_better(self, other: Found, per: int) -> Found:
        """The better of both, super-block by super-block."""
        better = other.error < self.error
        spread = better.repeat_interleave(per)
        return Found(
            pick(better, other.units, self.units),
            pick(spread, other.integers, self.integers),
            torch.where(better, other.error, self.error),
        )


class _Nest:
    """What both kinds share: groups x and w of [group, n], `per` of them to a super-block."""

    def __init__(self, groups: Groups, per: int, integers: Steps) -> None:
        self.groups, self.per, self.integers = groups, per, integers

    def spread(self, units: Tensor) -> Tensor:
        return units.repeat_interleave(self.per)

    def total(self, values: Tensor) -> Tensor:
        return fold(values.view(-1, self.per).T.contiguous())

    def unit_of(self, scales: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
        """The float16 unit of scales [n] that matter as much as `curvature` says, and the integers."""

        def upright(values: Tensor) -> Tensor:
            return values.view(-1, self.per).T.contiguous()

        outer = Groups(upright(scales), upright(curvature), self.integers)
        unit, _ = symmetric(outer, to_unit)
        outer.round(unit)
        return unit, outer.q.T.reshape(-1)

    def clamp(self, integers: Tensor) -> Tensor:
        return integers.clamp(self.integers.low, self.integers.high)


def nested_symmetric(groups: Groups, per: int, integers: Steps) -> Found:
    """Values ``unit * integer * multiple``."""
    nest = _Nest(groups, per, integers)
    free, _ = symmetric(groups, exactly)
    groups.round(free)
    unit, whole = nest.unit_of(free, groups.sums()[1])
    best = _nearby_scales(nest, unit, whole)
    for _ in range(INTEGER_SWEEPS - 1):
        best = best.or_better(_units_of_scales(nest, best), per)
        best = best.or_better(_nearby_scales(nest, best.units[0], best.integers[0]), per)
    return best


def _nearby_scales(nest: _Nest, unit: Tensor, whole: Tensor) -> Found:
    """Every group's integer replaced by the best of its neighbours."""
    spread = nest.spread(unit)
    tried = [whole, *(nest.clamp(whole + step) for step in WINDOW)]
    errors = nest.groups.errors([spread * other for other in tried])
    best: tuple[Tensor, ...] = (whole, errors[0])
    for other, error in zip(tried[1:], errors[1:], strict=True):
        best = pick(error < best[1], (other, error), best)
    return Found((unit,), (best[0],), nest.total(best[1]))


def _units_of_scales(nest: _Nest, start: Found) -> Found:
    """Units and integers by least squares under the present codes, in turn."""
    (unit,), (whole,) = start.units, start.integers
    nest.groups.round(nest.spread(unit) * whole)
    _, square, across = nest.groups.sums()
    for _ in range(2):
        unit = to_unit(quotient(nest.total(whole * across), nest.total(whole.square() * square)))
        whole = nest.clamp(quotient(across, square * nest.spread(unit)).round_())
    error = nest.groups.rounded_error(nest.spread(unit) * whole)
    return Found((unit,), (whole,), nest.total(error))


def nested_affine(groups: Groups, per: int, integers: Steps) -> Found:
    """Values ``unit * integer * multiple - other unit * other integer``; all integers are at least 0."""
    nest = _Nest(groups, per, integers)
    best = _nearby_lines(nest, _first_lines(nest))
    for _ in range(INTEGER_SWEEPS - 1):
        best = best.or_better(_units_of_lines(nest, best), per)
        best = best.or_better(_nearby_lines(nest, best), per)
    return best


def _first_lines(nest: _Nest) -> Found:
    """Scales first, then the offsets that suit them as stored."""
    groups = nest.groups
    scale, offset, _ = affine(groups, exactly, below_zero=True)
    groups.round(scale, offset)
    linear, square, _ = groups.sums()
    weight, total = groups.weight, groups.total
    stiff = (square - quotient(linear.square(), weight) / 2).clamp_(min=0)  # the offset follows, as far as it can
    unit, whole = nest.unit_of(scale.clamp(min=0), stiff)
    offset = quotient(nest.spread(unit) * whole * linear - total, weight).clamp_(min=0)
    low_unit, low_whole = nest.unit_of(offset, weight)
    return _found(nest, (unit, low_unit), (whole, low_whole))


def _found(nest: _Nest, units: tuple[Tensor, ...], whole: tuple[Tensor, ...]) -> Found:
    return Found(units, whole, nest.total(_line_errors(nest, units, whole)))


def _line_errors(nest: _Nest, units: tuple[Tensor, ...], whole: tuple[Tensor, ...]) -> Tensor:
    return nest.groups.rounded_error(nest.spread(units[0]) * whole[0], -nest.spread(units[1]) * whole[1])


def _nearby_lines(nest: _Nest, start: Found) -> Found:
    """Every group's pair of integers replaced by the best of its neighbours."""
    unit, low_unit = (nest.spread(one) for one in start.units)
    tried = [start.integers]
    for moves in MOVES:
        tried.append(tuple(nest.clamp(whole + move) for whole, move in zip(start.integers, moves, strict=True)))
    errors = nest.groups.errors([unit * pair[0] for pair in tried], [-low_unit * pair[1] for pair in tried])
    best = (*start.integers, errors[0])
    for pair, error in zip(tried[1:], errors[1:], strict=True):
        best = pick(error < best[2], (*pair, error), best)
    return Found(start.units, best[:2], nest.total(best[2]))


def _units_of_lines(nest: _Nest, start: Found) -> Found:
    """Both units by least squares under the present codes and integers."""
    groups, total = nest.groups, nest.total
    whole, low_whole = start.integers
    _line_errors(nest, start.units, start.integers)
    linear, square, across = groups.sums()
    weight, sum_x = groups.weight, groups.total
    a, b, c = total(whole.square() * square), -total(whole * low_whole * linear), total(low_whole.square() * weight)
    right, low_right = total(whole * across), -total(low_whole * sum_x)
    determinant = a * c - b * b
    both = quotient(c * right - b * low_right, determinant), quotient(a * low_right - b * right, determinant)
    alone = quotient(right - b * start.units[1], a), start.units[1]
    units = pick(determinant > 1e-6 * a * c, both, alone)
    return _found(nest, tuple(to_half(unit) for unit in units), start.integers)
