"""Scales of groups of numbers, searched so that the weighted squared error of rounding is least.

Arrays are upright: [group, n], one column per group. A search tries scales on a grid, finds for each the codes and
then the least-squares scale of these codes in closed form, takes the best, and repeats rounding and least squares from
there. Errors that decide are computed with the scale as stored (float16).

Candidate scales and closed-form least squares are as in llama.cpp's quantizers (ggml-quants.c); the objective here is
the plain weighted error, and negative scales and clipped extremes are searched as well.
"""

from __future__ import annotations

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
FACTORS = (0.55, 0.65, 0.72, 0.78, 0.83, 0.87, 0.91, 0.95, 0.98, 1.01, 1.05, 1.1)
SWEEPS = 4


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

    def nearest(self, ratio: Tensor) -> Tensor:
        """The nearest multiple to each entry of `ratio` (float), which may be overwritten."""
        if self.table is None:
            return ratio.round_().clamp_(self.low, self.high)
        first, lookup = _lookup(self.table)
        index = ratio.mul_(2).ceil_().clamp_(first, first + lookup.numel() - 1).sub_(first).to(torch.int32)
        return torch.index_select(lookup.to(ratio.device), 0, index.reshape(-1)).reshape(index.shape)


@lru_cache(maxsize=8)
def _lookup(table: tuple[int, ...]) -> tuple[int, Tensor]:
    """Nearest entries by twice the value rounded up, and the value of the first."""
    doubled = [a + b for a, b in pairwise(table)]  # twice the middles, integers
    first, last = doubled[0], doubled[-1] + 1
    steps = torch.arange(first, last + 1)
    codes = torch.bucketize(steps, torch.tensor(doubled))
    return first, torch.tensor(table, dtype=torch.float32)[codes]


def to_half(values: Tensor) -> Tensor:
    """Rounded to float16 and back, without infinities."""
    return values.clamp(-HALF_MAX, HALF_MAX).to(torch.float16).to(torch.float32)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where that is not finite."""
    value = 1 / scale
    return torch.where(torch.isfinite(value), value, torch.zeros_like(value))


def symmetric(x: Tensor, w: Tensor, steps: Steps) -> Tensor:
    """[n] scales, exact in float16, for ``scale * multiple``; minimize ``sum w (x - scale * multiple)^2``."""
    wx = w * x
    extreme = torch.gather(x, 0, x.abs().argmax(0, keepdim=True))[0]
    best = torch.zeros_like(extreme)
    gain = torch.full_like(extreme, -1.0)
    for end in (steps.low, steps.high):
        for factor in FACTORS:
            q = steps.nearest(x * inverse(extreme * (factor / end)))
            scale, score = least_squares(q, w, wx)
            better = score > gain
            best, gain = torch.where(better, scale, best), torch.where(better, score, gain)
    return _polish(x, w, wx, best, steps)


def least_squares(q: Tensor, w: Tensor, wx: Tensor) -> tuple[Tensor, Tensor]:
    """The best scale of each group for given multiples, and by how much it lowers the weighted error from zero's."""
    across = (wx * q).sum(0)
    square = (w * q).mul_(q).sum(0)
    scale = torch.where(square > 0, across / square, torch.zeros_like(across))
    return scale, scale * across


def _polish(x: Tensor, w: Tensor, wx: Tensor, scale: Tensor, steps: Steps) -> Tensor:
    best = torch.zeros_like(scale)
    least = (wx * x).sum(0)
    for _ in range(SWEEPS):
        scale = to_half(scale)
        q = steps.nearest(x * inverse(scale))
        error = (q * scale).sub_(x).square_().mul_(w).sum(0)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
        scale, _ = least_squares(q, w, wx)
    return best
