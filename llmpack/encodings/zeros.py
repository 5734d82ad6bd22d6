"""Search of a scale and the code of zero for groups of numbers: ``x ~ scale * (code - zero)``, codes 0 .. high.

Arrays are upright as in `llmpack.encodings.search`: [group, n]. The objective is the plain weighted squared error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmpack.encodings.search import SLACK, SWEEPS, Groups, Store, pick, quotient
from llmpack.encodings.steps import Steps

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")


class ZeroGroups(Groups):
    """Groups whose multiples run from ``-zero`` to ``high - zero``, each group with a zero of its own."""

    def __init__(self, x: Tensor, w: Tensor, steps: Steps) -> None:
        self.zero = x.new_zeros(x.shape[1])
        super().__init__(x, w, steps)

    def round(self, scale: Tensor, offset: Tensor | None = None) -> None:
        """From now on multiples are those nearest to ``x / scale``. ValueError for an offset: zero is a code here."""
        if offset is not None:
            raise ValueError("groups with an integer zero have no offset")
        self.low, self.high = -self.zero, self.steps.codes - 1 - self.zero
        super().round(scale)


def with_zero(groups: ZeroGroups, store: Store) -> tuple[Tensor, Tensor, Tensor]:
    """Scales [n] as stored, zeros [n] (whole, 0 .. high), and their errors.

    Ranges that reach beyond the numbers or clip them are tried on either side, each with the zero nearest to it and
    the least-squares scale of its codes. From the best, and from the plain range, neighbouring zeros are tried.
    """
    high = groups.steps.codes - 1
    low, top = groups.x.amin(0).clamp(max=0), groups.x.amax(0).clamp(min=0)
    span = top - low
    found: tuple[Tensor, ...] = (torch.zeros_like(span), torch.zeros_like(span), torch.zeros_like(span))
    for below in SLACK:
        for above in SLACK:
            scale = span / (high - below - above)
            groups.zero = _whole(below - quotient(low, scale), high)
            groups.round(scale)
            _, square, across = groups.sums()
            best = quotient(across, square)
            found = pick(best * across > found[2], (best, groups.zero, best * across), found)
    plain = store(span / high)
    groups.zero = _whole(-quotient(low, plain), high)
    kept: tuple[Tensor, ...] = (plain, groups.zero, groups.rounded_error(plain))
    for _ in range(SWEEPS):
        start = found[:2]
        for shift in (-1, 0, 1):
            groups.zero = _whole(start[1] + shift, high)
            scale = store(start[0])
            error = groups.rounded_error(scale)
            kept = pick(error < kept[2], (scale, groups.zero, error), kept)
        groups.zero = kept[1]
        groups.round(kept[0])
        _, square, across = groups.sums()
        found = quotient(across, square), kept[1]
    return kept[0], kept[1], kept[2]


def _whole(zero: Tensor, high: int) -> Tensor:
    return zero.round().clamp_(0, high)
