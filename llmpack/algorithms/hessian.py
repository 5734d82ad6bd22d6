"""Second moments of a layer's inputs, and the triangular factor that error-compensated rounding walks along.

For a linear map ``y = W x`` the squared error of a rounded ``Q`` over the inputs seen is
``tr((W - Q) H (W - Q)^T)`` per token, with ``H = E[x x^T]``. Its diagonal is what llama.cpp calls the
importance matrix; the whole of it is what GPTQ needs (Frantar et al. 2022, arXiv:2210.17323).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmpack.errors import NumericalError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

CHUNK = 4096
"""Tokens per float32 product: bounds the error of a sum, and the memory of a converted input."""

TILE = 512
"""Columns per product: only tiles on and above the diagonal are computed."""

RAISES = (1.0, 2.0, 5.0, 10.0, 30.0, 100.0)
"""Factors by which damping is raised, one after the other, while a Hessian does not factor."""

SMALLEST_DAMPING = 1e-4
"""What a raise starts from when the recipe asks for less."""


class HessianSum:
    """Running sum of ``x x^T`` over tokens, float32; one buffer of ``columns^2`` numbers.

    Products of chunks of tokens are formed first and then added: had each token been added to the sum
    itself, a million of them would leave three digits. Only the upper tiles are kept; `mean` mirrors
    them, so the result is exactly symmetric.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.columns = columns
        self.tokens = 0
        self._sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)

    def add(self, x: Tensor) -> None:
        """Add inputs [..., columns] of any float dtype; every leading index is a token."""
        x = x.detach().reshape(-1, self.columns)
        for chunk in torch.split(x, CHUNK):
            rows = chunk.to(device=self._sum.device, dtype=torch.float32)
            for start in range(0, self.columns, TILE):
                stop = min(start + TILE, self.columns)
                self._sum[start:stop, start:].add_(rows[:, start:stop].T @ rows[:, start:])
        self.tokens += x.shape[0]

    def mean(self) -> Tensor:
        """``H = E[x x^T]`` [columns, columns] float32, exactly symmetric.

        Raises NumericalError when no token was added or an input was not finite.
        """
        if self.tokens == 0:
            raise NumericalError("no token reached this layer, so its Hessian is unknown; add calibration text")
        upper = torch.triu(self._sum) / self.tokens
        if not bool(torch.isfinite(upper).all()):
            raise NumericalError(
                f"inputs of this layer were not finite within {self.tokens} calibration tokens; "
                "the blocks before it overflow: run the forward pass in float32"
            )
        return upper + torch.triu(upper, 1).T


class CrossSum:
    """Running sum of ``r x^T`` over tokens, float32, for two vectors seen at the same places.

    rows  width of r where it is not that of x
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu", rows: int | None = None) -> None:
        self.columns, self.rows = columns, columns if rows is None else rows
        self.tokens = 0
        self._sum = torch.zeros(self.rows, columns, dtype=torch.float32, device=device)

    def add(self, reference: Tensor, x: Tensor) -> None:
        """Add pairs [..., rows] and [..., columns] of any float dtype; every leading index is a token."""
        r, x = reference.detach().reshape(-1, self.rows), x.detach().reshape(-1, self.columns)
        for left, right in zip(torch.split(r, CHUNK), torch.split(x, CHUNK), strict=True):
            left, right = (one.to(device=self._sum.device, dtype=torch.float32) for one in (left, right))
            for start in range(0, self.rows, TILE):
                stop = min(start + TILE, self.rows)
                self._sum[start:stop].add_(left[:, start:stop].T @ right)
        self.tokens += x.shape[0]

    def mean(self) -> Tensor:
        """``E[r x^T]`` [rows, columns] float32. Raises NumericalError as `HessianSum.mean` does."""
        if self.tokens == 0:
            raise NumericalError("no token reached this layer; add calibration text")
        mean = self._sum / self.tokens
        if not bool(torch.isfinite(mean).all()):
            raise NumericalError(f"inputs of this layer were not finite within {self.tokens} calibration tokens")
        return mean


@dataclass(frozen=True)
class Factor:
    """A Hessian made ready for rounding columns one after the other.

    order    [columns] int64: order[i] is the column that is rounded i-th
    upper    [columns, columns]: upper triangular R with ``R R^T = H + damping * mean(diag H) * I``, rows
             and columns in rounding order
    damping  the fraction that was used
    raised   fractions that were tried before it and did not factor
    dead     columns whose input was always zero
    """

    order: Tensor
    upper: Tensor
    damping: float
    raised: tuple[float, ...]
    dead: int


def rounding_order(H: Tensor, order: str) -> Tensor:
    """[columns] int64; "activation" takes the largest mean squared input first, "natural" left to right.

    Early columns are rounded freely while later ones still absorb their error, so the columns
    that matter most go first (`act-order`). Equal inputs keep their order.
    """
    if order == "natural":
        return torch.arange(H.shape[0], device=H.device)
    if order != "activation":
        raise ValueError(f"order {order!r} is neither 'activation' nor 'natural'")
    return torch.argsort(torch.diagonal(H), descending=True, stable=True)


def damped(H: Tensor, damping: float) -> Tensor:
    """H with `damping` times the mean of its diagonal (over columns that are not dead) added to the diagonal."""
    diagonal = torch.diagonal(H)
    alive = diagonal[diagonal > 0]
    return H + damping * float(alive.mean()) * torch.eye(len(H), dtype=H.dtype) if len(alive) else H.clone()


def factorize(H: Tensor, damping: float = 0.01, order: str = "activation", dtype: torch.dtype | None = None) -> Factor:
    """The triangular factor of a damped Hessian in rounding order.

    H        [columns, columns] symmetric, ``E[x x^T]``
    damping  fraction of the mean of H's diagonal (over columns that are not dead) added to it
    dtype    of the result, float64 unless told; the factorization itself always runs in float64

    ``R R^T = H`` with upper triangular R is Cholesky's factor of H read backwards. GPTQ is usually
    written with its inverse (``U = R^-1``, ``U^T U = H^-1``); R needs no inverse, half the work and none of
    its loss of digits.

    A matrix that does not factor is tried again with damping raised by `RAISES`; the result says so.
    Raises NumericalError when none of them helps.
    """
    columns = rounding_order(H, order)
    damped = H.index_select(0, columns).index_select(1, columns).to(torch.float64)
    diagonal = torch.diagonal(damped).clone()
    dead = diagonal <= 0
    alive = diagonal[~dead]
    mean = float(alive.mean()) if alive.numel() else 1.0
    raised: list[float] = []
    for raise_by in RAISES:
        fraction = damping if raise_by == 1.0 else max(damping, SMALLEST_DAMPING) * raise_by
        torch.diagonal(damped).copy_(torch.where(dead, mean, diagonal) + fraction * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(failed) == 0 and bool(torch.isfinite(lower).all()):
            upper = lower.flip(0, 1).to(dtype or torch.float64).contiguous()
            return Factor(columns, upper, fraction, tuple(raised), int(dead.sum()))
        raised.append(fraction)
    tried = ", ".join(f"{fraction:g}" for fraction in raised)
    raise NumericalError(
        f"the Hessian [{H.shape[0]} x {H.shape[0]}] is not positive definite even with damping {raised[-1]:g} "
        f"(tried {tried}; mean of its diagonal {mean:.3g}); "
        'use more calibration tokens, raise `damping`, or allow `on_failure = "rtn"`'
    )
