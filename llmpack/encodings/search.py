"""Scales of groups of numbers, searched so that the weighted squared error of rounding is least.

Arrays are upright: [group, n], one column per group. A search tries many scales, finds for each the codes and then the
least-squares scale (and offset) of these codes in closed form, takes the best, and from there repeats rounding and
least squares. Errors that decide at the end are computed with the numbers that the file stores.

Candidate scales with closed-form least squares are the scheme of llama.cpp's quantizers (ggml-quants.c). Here the
objective is the plain weighted error, both signs of a scale are tried where they differ, and clipping is searched far
enough for weights that differ by orders of magnitude.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

HALF_MAX = 65504.0
SWEEPS = 3


@dataclass(frozen=True)
class Steps:
    """The multiples of a scale that codes stand for: low .. high, or the entries of an integer table."""

    low: int
    high: int
    table: tuple[int, ...] | None = None

    @property
    def codes(self) -> int:
        """How many codes there are."""
        return self.high - self.low + 1 if self.table is None else len(self.table)

    @property
    def first_code(self) -> int:
        """The code of multiple 0; 0 where a table says what codes mean."""
        return -self.low if self.table is None else 0

    @property
    def values(self) -> Tensor | None:
        """The table as float32, or None."""
        return None if self.table is None else torch.tensor(self.table, dtype=torch.float32)


@lru_cache(maxsize=8)
def _lookup(table: tuple[int, ...]) -> tuple[int, Tensor]:
    """Nearest entries by twice the value rounded up, and the value of the first."""
    doubled = [a + b for a, b in pairwise(table)]  # twice the middles, integers
    first, last = doubled[0], doubled[-1] + 1
    codes = torch.bucketize(torch.arange(first, last + 1), torch.tensor(doubled))
    return first, torch.tensor(table, dtype=torch.float32)[codes]


def to_half(values: Tensor) -> Tensor:
    """Rounded to float16 and back, without infinities."""
    return values.clamp(-HALF_MAX, HALF_MAX).to(torch.float16).to(torch.float32)


def exactly(values: Tensor) -> Tensor:
    """`values` as they are: for scales that are not yet what the file stores."""
    return values


def quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where that is not finite."""
    return torch.nan_to_num_(numerator / denominator, 0.0, 0.0, 0.0)


class Groups:
    """Numbers of many groups with their weights, the multiples they are rounded to, and room to work in.

    x, w  [group, n] float32
    """

    def __init__(self, x: Tensor, w: Tensor, steps: Steps) -> None:
        self.x, self.w, self.steps = x, w, steps
        self.q = torch.empty_like(x)
        self.spare = torch.empty_like(x)
        self.index = torch.empty_like(x, dtype=torch.int32) if steps.table else None

    def round(self, scale: Tensor, offset: Tensor | None = None) -> None:
        """Put the multiples nearest to ``(x - offset) / scale`` into `q`."""
        x, steps = self.x, self.steps
        if offset is not None:
            x = torch.sub(x, offset, out=self.q)
        torch.mul(x, quotient(torch.ones_like(scale), scale), out=self.q)
        if self.index is None or steps.table is None:
            self.q.round_().clamp_(steps.low, steps.high)
            return
        first, lookup = _lookup(steps.table)
        self.q.mul_(2).ceil_().clamp_(first, first + lookup.numel() - 1).sub_(first)
        self.index.copy_(self.q)
        torch.index_select(lookup.to(x.device), 0, self.index.view(-1), out=self.q.view(-1))

    def error(self, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        """[n] weighted squared error of the present multiples."""
        values = torch.mul(self.q, scale, out=self.spare)
        if offset is not None:
            values.add_(offset)
        return values.sub_(self.x).square_().mul_(self.w).sum(0)


def symmetric(groups: Groups, factors: tuple[float, ...], store: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Scales [n] as stored, and their errors; minimize ``sum w (x - scale * multiple)^2``.

    factors  how much shorter than the largest number the range of codes may be
    """
    x, steps = groups.x, groups.steps
    extreme = torch.gather(x, 0, x.abs().argmax(0, keepdim=True))[0]
    wx = groups.w * x
    best, gain = torch.zeros_like(extreme), torch.zeros_like(extreme)
    for end in (steps.low, steps.high):
        for factor in factors:
            groups.round(extreme * (factor / end))
            scale, score = _scale_of(groups, wx)
            better = score > gain
            best, gain = torch.where(better, scale, best), torch.where(better, score, gain)
    return _polish_scale(groups, wx, best, store)


def _scale_of(groups: Groups, wx: Tensor) -> tuple[Tensor, Tensor]:
    """The best scale for the present multiples, and by how much it lowers the error from zero's."""
    square = torch.mul(groups.w, groups.q, out=groups.spare).mul_(groups.q).sum(0)
    across = torch.mul(wx, groups.q, out=groups.spare).sum(0)
    scale = quotient(across, square)
    return scale, scale * across


def _polish_scale(
    groups: Groups, wx: Tensor, scale: Tensor, store: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    best = torch.zeros_like(scale)
    least = torch.mul(wx, groups.x, out=groups.spare).sum(0)
    for _ in range(SWEEPS):
        scale = store(scale)
        groups.round(scale)
        error = groups.error(scale)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
        scale, _ = _scale_of(groups, wx)
    return best, least


def affine(
    groups: Groups, ranges: tuple[tuple[float, float], ...], store: Callable[[Tensor], Tensor], below_zero: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and offsets [n] as stored, and their errors; minimize ``sum w (x - scale * multiple - offset)^2``.

    Multiples start at 0.

    ranges      which parts of the span from the least to the largest number the codes may cover
    below_zero  offsets are at most 0
    """
    x, w, high = groups.x, groups.w, groups.steps.high
    low = x.amin(0).clamp_(max=0) if below_zero else x.amin(0)
    span = x.amax(0) - low
    lines = _Lines(groups, below_zero)
    scale, offset, gain = lines.flat()
    for start, stop in ranges:
        groups.round(span * ((stop - start) / high), low + span * start)
        found = lines.best()
        better = found[2] > gain
        scale, offset, gain = (torch.where(better, new, old) for new, old in zip(found, (scale, offset, gain), strict=True))
    return _polish_line(groups, lines, scale, offset, store)


class _Lines:
    """Least squares of x by a line over the multiples, numbers taken from their weighted mean for precision."""

    def __init__(self, groups: Groups, below_zero: bool) -> None:
        self.groups, self.below_zero = groups, below_zero
        self.weight = groups.w.sum(0)
        self.mean = (groups.w * groups.x).sum(0) / self.weight
        self.centred = groups.w * (groups.x - self.mean)

    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scale 0: the mean alone."""
        offset = self.mean.clamp(max=0) if self.below_zero else self.mean.clone()
        return torch.zeros_like(offset), offset, -self.weight * (self.mean - offset).square()

    def best(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, offset, and by how much they lower the error from that of the mean."""
        g = self.groups
        weighted = torch.mul(g.w, g.q, out=g.spare)
        linear = weighted.sum(0)
        square = weighted.mul_(g.q).sum(0)
        across = torch.mul(self.centred, g.q, out=g.spare).sum(0)
        spread = square - linear * linear / self.weight
        scale = torch.where(spread > 1e-6 * square, quotient(across, spread), 0.0)
        offset = self.mean - scale * linear / self.weight
        gain = scale * across
        if not self.below_zero:
            return scale, offset, gain
        through_zero = across + self.mean * linear
        other = quotient(through_zero, square)
        above = offset > 0
        scale = torch.where(above, other, scale)
        gain = torch.where(above, other * through_zero - self.mean.square() * self.weight, gain)
        return scale, offset.clamp_(max=0), gain


def _polish_line(
    groups: Groups, lines: _Lines, scale: Tensor, offset: Tensor, store: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    best = (torch.zeros_like(scale), torch.zeros_like(scale), torch.full_like(scale, float("inf")))
    for _ in range(SWEEPS):
        scale, offset = store(scale), store(offset)
        groups.round(scale, offset)
        error = groups.error(scale, offset)
        better = error < best[2]
        best = (
            torch.where(better, scale, best[0]),
            torch.where(better, offset, best[1]),
            torch.where(better, error, best[2]),
        )
        scale, offset, _ = lines.best()
    return best
