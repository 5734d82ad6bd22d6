"""Scales of groups of numbers, searched so that the weighted squared error of rounding is least.

Arrays are upright: [group, n], one column per group. A search tries many scales, finds for each the codes and then the
least-squares scale (and offset) of these codes in closed form, takes the best, and from there repeats rounding and
least squares. Errors that decide at the end are computed with the numbers that the file stores.

Candidate scales with closed-form least squares are the scheme of llama.cpp's quantizers (ggml-quants.c). Here the
objective is the plain weighted error, both signs of a scale are tried where they differ, and clipping is searched far
enough for weights that differ by orders of magnitude.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from llmpack.encodings.steps import Steps, lookup

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llmpack.encodings import kernels
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")
    kernels = LazyModule("llmpack.encodings.kernels")

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
    """Numbers of many groups with their weights, and how they are rounded now.

    x, w       [group, n] float32
    low, high  [n]: the outermost multiples of each group
    """

    def __init__(self, x: Tensor, w: Tensor, steps: Steps) -> None:
        self.x, self.w, self.steps = x.contiguous(), w.contiguous(), steps
        self.wx = self.w * self.x
        self.low, self.high = (x.new_full(x.shape[1:], float(end)) for end in (steps.low, steps.high))
        self._nowhere = x.new_zeros(x.shape[1])
        self._table = _table_of(steps)
        self.round(self._nowhere)

    def round(self, scale: Tensor, offset: Tensor | None = None) -> None:
        """From now on multiples are those nearest to ``(x - offset) / scale``."""
        self._offset = self._nowhere if offset is None else offset
        self._inverse = quotient(torch.ones_like(scale), scale)

    @property
    def rounding(self) -> kernels.Rounding:
        """How numbers are rounded now."""
        offset, inverse = self._offset.contiguous().numpy(), self._inverse.numpy()
        return kernels.Rounding(offset, inverse, self.low.numpy(), self.high.numpy(), *self._table)

    @property
    def q(self) -> Tensor:
        """[group, n] float32: the present multiples."""
        found = torch.empty_like(self.x)
        kernels.multiples(self.x.numpy(), self.rounding, found.numpy())
        return found

    def rounded_error(self, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        """[n] weighted squared error of rounding to nearest, which is how numbers are rounded from now on."""
        self.round(scale, offset)
        return self.errors([scale], [self._offset])[0]

    def errors(self, scales: Sequence[Tensor], offsets: Sequence[Tensor] | None = None) -> Tensor:
        """[tries, n] weighted squared errors of rounding to nearest by some scales and offsets."""
        tried = torch.stack(list(scales))
        shifts = torch.zeros_like(tried) if offsets is None else torch.stack(list(offsets))
        found = torch.empty_like(tried)
        given = (self.x, self.w, tried, shifts)
        kernels.errors(*(part.numpy() for part in given), self.rounding, found.numpy())
        return found

    def sums(self, weighted: Tensor | None = None) -> Tensor:
        """[3, n] ``sum w q``, ``sum w q^2`` and ``sum w x q`` (``sum weighted q``) of the present multiples."""
        across = self.wx if weighted is None else weighted
        found = self.x.new_empty(3, self.x.shape[1])
        kernels.sums(self.x.numpy(), self.w.numpy(), across.numpy(), self.rounding, found.numpy())
        return found

    def best_scale(self, extreme: Tensor, shares: Sequence[float]) -> Tensor:
        """[n] the best of the least-squares scales of roundings by ``extreme * shares``."""
        found = torch.empty_like(extreme)
        tried = torch.tensor(shares, dtype=torch.float32)
        given = (self.x, self.w, self.wx, extreme, tried)
        kernels.best_scales(*(part.numpy() for part in given), self.rounding, found.numpy())
        return found

    @cached_property
    def weight(self) -> Tensor:
        """[n] ``sum w``."""
        return fold(self.w.clone())

    @cached_property
    def total(self) -> Tensor:
        """[n] ``sum w x``."""
        return fold(self.wx.clone())


def _table_of(steps: Steps) -> tuple[int, kernels.Floats]:
    """What `kernels.Rounding` wants of a table of multiples."""
    if steps.table is None:
        return 0, torch.empty(0).numpy()
    table = lookup(steps.table)
    if table is None:
        raise ValueError(f"multiples {steps.table} cannot be looked up: their middles are neither whole nor half")
    return table.first, table.values.numpy()


def symmetric(groups: Groups, store: Store) -> tuple[Tensor, Tensor]:
    """Scales [n] as stored, and their errors; minimize ``sum w (x - scale * multiple)^2``."""
    least, largest = groups.x.amin(0), groups.x.amax(0)
    extreme = torch.where(largest >= -least, largest, least)
    scale = groups.best_scale(extreme, [factor / end for end in groups.steps.ends for factor in FACTORS])
    plain = store(extreme / groups.steps.ends[0])
    best = pick_least(groups, (torch.zeros_like(scale), plain))
    for _ in range(SWEEPS):
        scale = store(scale)
        error = groups.rounded_error(scale)
        best = pick(error < best[1], (scale, error), best)
        _, square, across = groups.sums()
        scale = quotient(across, square)
    return best[0], best[1]


def pick_least(groups: Groups, scales: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The scale of least error among a few, and the error."""
    errors = groups.errors(scales)
    best: tuple[Tensor, ...] = (scales[0], errors[0])
    for scale, error in zip(scales[1:], errors[1:], strict=True):
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
    scale, offset = lines.best(low, span)
    plain = store(span / high), store(low)
    best: tuple[Tensor, ...] = (*plain, groups.rounded_error(*plain))
    for _ in range(SWEEPS):
        scale, offset = store(scale), store(offset)
        error = groups.rounded_error(scale, offset)
        best = pick(error < best[2], (scale, offset, error), best)
        scale, offset = lines.present()
    return best[0], best[1], best[2]


class Lines:
    """Least squares of x by a line over the multiples, numbers taken from their weighted mean for precision."""

    def __init__(self, groups: Groups, below_zero: bool) -> None:
        self.groups, self.below_zero = groups, below_zero
        self.weight = groups.weight
        self.mean = quotient(groups.total, self.weight)
        self.centred = groups.w * (groups.x - self.mean)

    def best(self, low: Tensor, span: Tensor) -> tuple[Tensor, ...]:
        """Scales and offsets of the best lines of roundings whose ranges differ from that given by `SLACK`."""
        pairs = [(below, self.groups.steps.high - below - above) for below in SLACK for above in SLACK]
        below, codes = torch.tensor(pairs, dtype=torch.float32).T.contiguous()
        flat = self.mean.clamp(max=0) if self.below_zero else self.mean.clone()
        found = torch.stack([torch.zeros_like(flat), flat, -self.weight * (self.mean - flat).square()])
        given = (self.groups.x, self.groups.w, self.centred, self.mean, self.weight, low, span, below, codes)
        kernels.best_lines(*(part.numpy() for part in given), self.groups.rounding, self.below_zero, found.numpy())
        return found[0], found[1]

    def present(self) -> tuple[Tensor, ...]:
        """Scales and offsets of the lines over the present multiples."""
        sums, found = self.groups.sums(self.centred), self.mean.new_empty(2, len(self.mean))
        given = (sums, self.mean, self.weight)
        kernels.lines(*(part.numpy() for part in given), self.below_zero, found.numpy())
        return found[0], found[1]
