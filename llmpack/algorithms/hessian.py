"""Second moments of a layer's inputs, and the triangular factor that error-compensated rounding walks along.

For a linear map ``y = W x`` the squared error of a rounded ``Q`` over the inputs seen is
``tr((W - Q) H (W - Q)^T)`` per token, with ``H = E[x x^T]``. Its diagonal is what llama.cpp calls the
importance matrix; the whole of it is what GPTQ needs (Frantar et al. 2022, arXiv:2210.17323).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmpack.errors import NumericalError
from llmpack.profile import phase

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

STRIP = 128
"""Rows that are copied at once where a matrix is put into another order or type."""

RAISES = (1.0, 2.0, 5.0, 10.0, 30.0, 100.0)
"""Factors by which damping is raised, one after the other, while a Hessian does not factor."""

SMALLEST_DAMPING = 1e-4
"""What a raise starts from when the recipe asks for less."""


class HessianSum:
    """Running sum of ``x x^T`` over tokens, float32; one buffer of ``columns^2`` numbers.

    Products of chunks of tokens are formed first and then added: had each token been added to the sum
    itself, a million of them would leave three digits. Only the upper tiles are computed (half the work of the
    whole product); `mean` mirrors them, so the result is exactly symmetric.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.columns = columns
        self.tokens = 0
        self._whole = False
        self._sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)

    def add(self, x: Tensor) -> None:
        """Add inputs [..., columns] of any float dtype; every leading index is a token."""
        if self._whole:
            raise ValueError("the mean was taken already; what comes now belongs in another sum")
        x = x.detach().reshape(-1, self.columns)
        with phase(
            "second moments", tokens=len(x), flops=len(x) * self.columns * min(2.0 * self.columns, self.columns + TILE)
        ):
            for chunk in torch.split(x, CHUNK):
                self._add(chunk.to(device=self._sum.device, dtype=torch.float32))
        self.tokens += x.shape[0]

    def _add(self, rows: Tensor) -> None:
        for start in range(0, self.columns, TILE):
            stop = min(start + TILE, self.columns)
            self._sum[start:stop, start:].add_(rows[:, start:stop].T @ rows[:, start:])

    def to(self, device: torch.device | str) -> HessianSum:
        """This sum, moved to a device."""
        self._sum = self._sum.to(device)
        return self

    def mean(self) -> Tensor:
        """``H = E[x x^T]`` [columns, columns] float32, exactly symmetric.

        It takes the place of the sum, so that a wide input needs one buffer: nothing can be added any more.
        Raises NumericalError when no token was added or an input was not finite.
        """
        if self.tokens == 0:
            raise NumericalError("no token reached this layer, so its Hessian is unknown; add calibration text")
        if not self._whole:
            for start in range(0, self.columns, TILE):
                self._finish(start, min(start + TILE, self.columns))
            self._whole = True
        return self._sum

    def _finish(self, start: int, stop: int) -> None:
        """Divide the rows of some columns, and mirror them."""
        rows = self._sum[start:stop, start:].div_(self.tokens)
        if not _finite(rows):
            raise NumericalError(
                f"inputs of this layer were not finite within {self.tokens} calibration tokens; "
                "the blocks before it overflow: run the forward pass in float32"
            )
        corner = torch.triu(rows[:, : stop - start])
        self._sum[start:stop, start:stop] = corner + torch.triu(corner, 1).T
        self._sum[stop:, start:stop] = self._sum[start:stop, stop:].T


class CrossSum:
    """Running sum of ``r x^T`` over tokens, float32, for two vectors seen at the same places.

    rows  width of r where it is not that of x
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu", rows: int | None = None) -> None:
        self.columns, self.rows = columns, columns if rows is None else rows
        self.tokens = 0
        self._whole = False
        self._sum = torch.zeros(self.rows, columns, dtype=torch.float32, device=device)

    def add(self, reference: Tensor, x: Tensor) -> None:
        """Add pairs [..., rows] and [..., columns] of any float dtype; every leading index is a token."""
        if self._whole:
            raise ValueError("the mean was taken already; what comes now belongs in another sum")
        r, x = reference.detach().reshape(-1, self.rows), x.detach().reshape(-1, self.columns)
        with phase("cross moments", tokens=len(x), flops=2.0 * len(x) * self.rows * self.columns):
            for left, right in zip(torch.split(r, CHUNK), torch.split(x, CHUNK), strict=True):
                left, right = (one.to(device=self._sum.device, dtype=torch.float32) for one in (left, right))
                for start in range(0, self.rows, TILE):
                    stop = min(start + TILE, self.rows)
                    self._sum[start:stop].add_(left[:, start:stop].T @ right)
        self.tokens += x.shape[0]

    def to(self, device: torch.device | str) -> CrossSum:
        """This sum, moved to a device."""
        self._sum = self._sum.to(device)
        return self

    def mean(self) -> Tensor:
        """``E[r x^T]`` [rows, columns] float32, in place of the sum. NumericalError as of `HessianSum.mean`."""
        if self.tokens == 0:
            raise NumericalError("no token reached this layer; add calibration text")
        if not self._whole:
            self._sum.div_(self.tokens)
            self._whole = True
        for rows in torch.split(self._sum, TILE):
            if not _finite(rows):
                raise NumericalError(f"inputs of this layer were not finite within {self.tokens} calibration tokens")
        return self._sum


def _finite(x: Tensor) -> bool:
    """Whether all numbers are finite; a NaN is both ends of what it is in. Makes no matrix of answers."""
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(x))


@dataclass(frozen=True)
class Factor:
    """A Hessian made ready for rounding columns one after the other.

    order    [columns] int64: order[i] is the column that is rounded i-th
    upper    [columns, columns]: upper triangular R with ``R R^T = H + damping * mean(diag H) * I``, rows
             and columns in rounding order
    added    [columns] float64: what was added to the diagonal, in rounding order
    damping  the fraction that was used
    raised   fractions that were tried before it and did not factor
    dead     columns whose input was always zero
    """

    order: Tensor
    upper: Tensor
    added: Tensor
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


def damping_level(H: Tensor, damping: float) -> float:
    """`damping` times the mean of H's diagonal over columns that are not dead; 0 where all are."""
    diagonal = torch.diagonal(H)
    alive = diagonal[diagonal > 0]
    return damping * float(alive.mean()) if len(alive) else 0.0


def damped(H: Tensor, damping: float) -> Tensor:
    """H with `damping` times the mean of its diagonal (over columns that are not dead) added to the diagonal."""
    stiff = H.clone()
    torch.diagonal(stiff).add_(damping_level(H, damping))
    return stiff


def factorize(
    H: Tensor,
    damping: float = 0.01,
    order: str = "activation",
    dtype: torch.dtype | None = None,
    *,
    overwrite: bool = False,
) -> Factor:
    """The triangular factor of a damped Hessian in rounding order.

    H        [columns, columns] symmetric, ``E[x x^T]``
    damping  fraction of the mean of H's diagonal (over columns that are not dead) added to it
    dtype    of the result, float64 unless told; the factorization itself always runs in float64
    overwrite  let the result take the memory of H where it has its dtype; after an error H is as it was

    ``R R^T = H`` with upper triangular R is Cholesky's factor of H read backwards. GPTQ is usually
    written with its inverse (``U = R^-1``, ``U^T U = H^-1``); R needs no inverse, half the work and none of
    its loss of digits.

    Memory at the peak, beside H: one matrix in float64, and the result where it cannot take the place of H.
    A matrix that does not factor is tried again with damping raised by `RAISES`; the result says so.
    Raises NumericalError when none of them helps.
    """
    columns = rounding_order(H, order)
    diagonal = torch.diagonal(H).to(torch.float64)[columns]
    dead = diagonal <= 0
    alive = diagonal[~dead]
    mean = float(alive.mean()) if alive.numel() else 1.0
    raised: list[float] = []
    for raise_by in RAISES:
        fraction = damping if raise_by == 1.0 else max(damping, SMALLEST_DAMPING) * raise_by
        raised_diagonal = torch.where(dead, mean, diagonal) + fraction * mean
        backwards = in_order(H, columns.flip(0), torch.float64)
        torch.diagonal(backwards).copy_(raised_diagonal.flip(0))
        if _cholesky_in_place(backwards):
            kind = dtype or torch.float64
            room = H if overwrite and H.dtype == kind else torch.empty(H.shape, dtype=kind, device=H.device)
            upper = _flipped(backwards, room)
            return Factor(columns, upper, raised_diagonal - diagonal, fraction, tuple(raised), int(dead.sum()))
        raised.append(fraction)
    tried = ", ".join(f"{fraction:g}" for fraction in raised)
    raise NumericalError(
        f"the Hessian [{H.shape[0]} x {H.shape[0]}] is not positive definite even with damping {raised[-1]:g} "
        f"(tried {tried}; mean of its diagonal {mean:.3g}); "
        'use more calibration tokens, raise `damping`, or allow `on_failure = "rtn"`'
    )


def in_order(H: Tensor, order: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of H with rows and columns in an order; no other matrix is made on the way."""
    ordered = torch.empty(H.shape, dtype=dtype, device=H.device)
    for start in range(0, len(order), STRIP):
        ordered[start : start + STRIP] = H.index_select(0, order[start : start + STRIP]).index_select(1, order)
    return ordered


def _cholesky_in_place(matrix: Tensor) -> bool:
    """Put ``L^T`` of ``matrix = L L^T`` into its upper triangle and zeros below; False if it is not positive definite.

    Transposed the matrix lies in memory column by column, as LAPACK wants it: then torch factors it where it is.
    """
    factor = matrix.T
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    if factor.data_ptr() != matrix.data_ptr():
        raise AssertionError("torch did not factor in place")
    return int(info) == 0 and bool(torch.isfinite(torch.diagonal(matrix)).all())


def _flipped(transposed: Tensor, upper: Tensor) -> Tensor:
    """Fill `upper` with the triangular R that is ``L^T`` read backwards: ``R_ij = L_(n-1-i)(n-1-j)``."""
    n = len(upper)
    for start in range(0, n, STRIP):
        stop = min(start + STRIP, n)
        upper[start:stop] = transposed[:, n - stop : n - start].flip(0, 1).T
    return upper
