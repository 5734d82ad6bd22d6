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
from typing import TYPE_CHECKING

from llmpack.encodings.steps import Steps, lookup

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

HALF_MAX = 65504.0
SWEEPS = 3
"""Repetitions of rounding and least squares after the best candidate is known."""

FACTORS = tuple(0.5 + i / 19 for i in range(20))
"""How far the range of codes reaches, as a share of the largest number."""

SLACK = (-2.0, -1.2, -0.6, -0.2, 0.2, 0.6)
"""How many codes beyond the least (largest) number the first (last) code lies; negative: it is clipped."""

Store = Callable[["Tensor"], "Tensor"]


def to_half(values: Tensor) -> Tensor:
    """Rounded to float16 and back, without infinities."""
    return values.clamp(-HALF_MAX, HALF_MAX).to(torch.float16).to(torch.float32)


def to_unit(values: Tensor) -> Tensor:
    """As `to_half`, but nothing becomes 0: a scale may be the smallest float16 and its multiples few."""
    halves = to_half(values)
    return torch.where((halves == 0) & (values != 0), values.sign() * 2.0**-24, halves)


def exactly(values: Tensor) -> Tensor:
    """`values` as they are: for scales that are not yet what the file stores."""
    return values


def quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where that is not finite."""
    return torch.nan_to_num_(numerator / denominator, 0.0, 0.0, 0.0)


def fold(values: Tensor) -> Tensor:
    """Sum over the first dimension; `values` is overwritten.

    Halves are added to halves, so that a column's sum depends on no other column: results are the same bit for bit
    whatever tiles and threads a matrix is cut into.
    """
    count = values.shape[0]
    while count > 1:
        half = (count + 1) // 2
        values[: count - half].add_(values[half:count])
        count = half
    return values[0].clone()


def pick(condition: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`new` where the condition holds, entry by entry of the tuples."""
    return tuple(torch.where(condition, a, b) for a, b in zip(new, old, strict=True))


class Groups:
    """Numbers of many groups with their weights, the multiples they are rounded to, and room to work in.

    x, w  [group, n] float32
    q     [group, n] float32: the multiples of the last `round`
    """

    def __init__(self, x: Tensor, w: Tensor, steps: Steps) -> None:
        self.x, self.w, self.steps = x, w, steps
        self.wx = w * x
        self.q = torch.empty_like(x)
        self._spare = torch.empty_like(x)
        self._lookup = None if steps.table is None else lookup(steps.table)
        self._index = None if self._lookup is None else torch.empty_like(x, dtype=torch.int32)

    def round(self, scale: Tensor, offset: Tensor | None = None) -> None:
        """Put the multiples nearest to ``(x - offset) / scale`` into `q`."""
        x = self.x if offset is None else torch.sub(self.x, offset, out=self.q)
        torch.mul(x, quotient(torch.ones_like(scale), scale), out=self.q)
        if self._lookup is None or self._index is None:
            self.q.round_().clamp_(self.steps.low, self.steps.high)
        else:
            self._index.copy_(self._lookup.index(self.q))
            values = self._lookup.values.to(self.q.device)
            torch.index_select(values, 0, self._index.view(-1), out=self.q.view(-1))

    def error(self, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        """[n] weighted squared error of the present multiples."""
        values = torch.mul(self.q, scale, out=self._spare)
        if offset is not None:
            values.add_(offset)
        return fold(values.sub_(self.x).square_().mul_(self.w))

    def rounded_error(self, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        """[n] weighted squared error of rounding to nearest."""
        self.round(scale, offset)
        return self.error(scale, offset)

    def across(self, weighted: Tensor | None = None) -> Tensor:
        """[n] ``sum w x q``, or ``sum weighted q``."""
        return fold(torch.mul(self.wx if weighted is None else weighted, self.q, out=self._spare))

    def square(self) -> Tensor:
        """[n] ``sum w q^2``."""
        return fold(torch.mul(self.w, self.q, out=self._spare).mul_(self.q))

    def linear_and_square(self) -> tuple[Tensor, Tensor]:
        """[n] ``sum w q`` and ``sum w q^2``."""
        linear = fold(torch.mul(self.w, self.q, out=self._spare))
        return linear, self.square()

    def weight(self) -> Tensor:
        """[n] ``sum w``."""
        return fold(self._spare.copy_(self.w))

    def total(self) -> Tensor:
        """[n] ``sum w x``."""
        return fold(self._spare.copy_(self.wx))


def symmetric(groups: Groups, store: Store) -> tuple[Tensor, Tensor]:
    """Scales [n] as stored, and their errors; minimize ``sum w (x - scale * multiple)^2``."""
    least, largest = groups.x.amin(0), groups.x.amax(0)
    extreme = torch.where(largest >= -least, largest, least)
    scale, gain = torch.zeros_like(extreme), torch.zeros_like(extreme)
    for end in groups.steps.ends:
        for factor in FACTORS:
            groups.round(extreme * (factor / end))
            across = groups.across()
            found = quotient(across, groups.square())
            score = found * across  # by how much it lowers the error from that of zeros
            scale, gain = pick(score > gain, (found, score), (scale, gain))
    plain = store(extreme / groups.steps.ends[0])
    best = pick_least(groups, (torch.zeros_like(scale), plain))
    for _ in range(SWEEPS):
        scale = store(scale)
        error = groups.rounded_error(scale)
        best = pick(error < best[1], (scale, error), best)
        scale = quotient(groups.across(), groups.square())
    return best[0], best[1]


def pick_least(groups: Groups, scales: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The scale of least error among a few, and the error."""
    best: tuple[Tensor, ...] = (scales[0], groups.rounded_error(scales[0]))
    for scale in scales[1:]:
        error = groups.rounded_error(scale)
        best = pick(error < best[1], (scale, error), best)
    return best


def affine(groups: Groups, store: Store, below_zero: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and offsets [n] as stored, and their errors; minimize ``sum w (x - scale * multiple - offset)^2``.

    Multiples start at 0. With `below_zero` offsets are at most 0.
    """
    high = groups.steps.high
    low = groups.x.amin(0)
    if below_zero:
        low = low.clamp(max=0)
    span = groups.x.amax(0) - low
    lines = Lines(groups, below_zero)
    found = lines.flat()
    for below in SLACK:
        for above in SLACK:
            scale = span / (high - below - above)
            groups.round(scale, low - scale * below)
            candidate = lines.best()
            found = pick(candidate[2] > found[2], candidate, found)
    plain = store(span / high), store(low)
    best: tuple[Tensor, ...] = (*plain, groups.rounded_error(*plain))
    scale, offset = found[:2]
    for _ in range(SWEEPS):
        scale, offset = store(scale), store(offset)
        error = groups.rounded_error(scale, offset)
        best = pick(error < best[2], (scale, offset, error), best)
        scale, offset, _ = lines.best()
    return best[0], best[1], best[2]


class Lines:
    """Least squares of x by a line over the multiples, numbers taken from their weighted mean for precision."""

    def __init__(self, groups: Groups, below_zero: bool) -> None:
        self.groups, self.below_zero = groups, below_zero
        self.weight = groups.weight()
        self.mean = quotient(groups.total(), self.weight)
        self.centred = groups.w * (groups.x - self.mean)

    def flat(self) -> tuple[Tensor, ...]:
        """Scale 0, the offset alone; as `best`."""
        offset = self.mean.clamp(max=0) if self.below_zero else self.mean
        return torch.zeros_like(offset), offset, -self.weight * (self.mean - offset).square()

    def best(self) -> tuple[Tensor, ...]:
        """Scale, offset, and by how much they lower the error from that of the mean, for the present multiples."""
        linear, square = self.groups.linear_and_square()
        across = self.groups.across(self.centred)
        middle = quotient(linear, self.weight)
        spread = square - linear * middle
        scale = torch.where(spread > 1e-6 * square, quotient(across, spread), torch.zeros_like(across))
        line = scale, self.mean - scale * middle, scale * across
        if not self.below_zero:
            return line
        through = across + self.mean * linear
        scale = quotient(through, square)
        zero = scale, torch.zeros_like(scale), scale * through - self.mean.square() * self.weight
        return pick(line[1] > 0, zero, line)
