"""Weights adjusted to inputs that earlier rounding has moved.

A matrix that should turn r into ``W r`` receives x, since the matrices before it were rounded. The
``V`` that minimizes ``E |W r - V x|^2`` is ``W + W E[(r - x) x^T] E[x x^T]^-1``; rounding V instead of W lets this
matrix make up for what it can predict of the errors before it. GPTAQ (Li et al. 2025,
arXiv:2504.02692) adds the same term column by column inside GPTQ; on fixed scales it can be taken
beforehand, in closed form, and the scales are then fitted to what is rounded.

Least squares on few tokens also predicts what is chance. So some sequences are kept out of the fit, and on these
every matrix shows how much of its shift is true. The same sequences decide wherever two roundings compete.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmpack.algorithms.hessian import CrossSum, Factor
from llmpack.encodings.encoding import Quantized
from llmpack.encodings.tiles import SLAB, runs

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

HELD_EVERY = 8
"""One sequence in so many is kept out of the fit."""

STRIP = 1024
"""Rows that are solved for at once."""

HELD_TOKENS = 1024
"""No more tokens than these are kept: they decide on one number for each matrix."""

TRIED_TOKENS = 384
"""So many of them, evenly taken, decide between two roundings of a matrix; both meet the same ones."""


class DriftSum:
    """How far one input has moved, over sequences seen twice: in the unchanged model (r) and now (x)."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self._sum = CrossSum(columns, device)
        self._sequences = 0
        self._held: list[tuple[Tensor, Tensor]] = []
        self._held_tokens = 0

    def add(self, reference: Tensor, x: Tensor) -> list[int]:
        """Add pairs [sequences, tokens, columns]; gives back which of these sequences belong to the fit."""
        fitted, moved = [], reference - x
        for at, now in enumerate(x):
            self._sequences += 1
            room = HELD_TOKENS - self._held_tokens
            if self._sequences % HELD_EVERY == 0 and room > 0:
                self._held.append((moved[at, :room].clone(), now[:room].clone()))
                self._held_tokens += len(now[:room])
            else:
                fitted.append(at)
        if len(fitted) == len(x):
            self._sum.add(moved, x)
        elif fitted:
            self._sum.add(moved[fitted], x[fitted])
        return fitted

    def to(self, device: torch.device | str) -> DriftSum:
        """This sum and the sequences kept out, moved to a device."""
        self._sum = self._sum.to(device)
        self._held = [(moved.to(device), now.to(device)) for moved, now in self._held]
        return self

    def moved(self) -> Tensor:
        """``E[(r - x) x^T]`` [columns, columns] float32 over the sequences of the fit; NumericalError without any."""
        return self._sum.mean()

    def held(self) -> tuple[Tensor, Tensor] | None:
        """``r - x`` and x, [tokens, columns] each, of the sequences kept out; None where there were too few."""
        if not self._held:
            return None
        moved, now = zip(*self._held, strict=True)
        return torch.cat(moved), torch.cat(now)


def shift(W: Tensor, moved: Tensor, factor: Factor) -> Tensor:
    """``S = W E[(r - x) x^T] (H + damping)^-1``: ``W + S`` is the best matrix for inputs that have moved.

    In the precision of ``factor.upper``, a few rows at a time.

    W       [rows, columns]
    moved   [columns, columns], of `DriftSum.moved`
    factor  of the damped H; damping leaves directions that hardly occur as they are
    """
    dtype = factor.upper.dtype
    if W.shape[0] > W.shape[1]:
        return W.to(dtype) @ _over_hessian(moved.to(dtype), factor)
    return _over_hessian(W.to(dtype) @ moved.to(dtype), factor)


def true_share(W: Tensor, S: Tensor, held: tuple[Tensor, Tensor] | None) -> float:
    """How much of a shift is true, from 0 to 1: the multiple of it that fits best to sequences it was not fitted to.

    held  of `DriftSum.held`; without them no shift can be trusted
    """
    if held is None:
        return 0.0
    moved, now = held
    wanted, predicted = (moved.to(W.dtype) @ W.T).double(), (now.to(W.dtype) @ S.to(W.dtype).T).double()
    energy = float(predicted.square().sum())
    return min(max(float((wanted * predicted).sum()) / energy, 0.0), 1.0) if energy > 0 else 0.0


def follow(W: Tensor, S: Tensor, strength: float) -> Tensor:
    """``W + strength * S`` in the dtype of W.

    The whole of it minimizes the error of this matrix alone, but least squares shrinks what it predicts from
    noisy inputs, and shrinking in every layer adds up; part of it is better for the model.
    """
    return W.to(torch.promote_types(W.dtype, S.dtype)).add(S, alpha=strength).to(W.dtype)


def tried(held: tuple[Tensor, Tensor] | None) -> Tensor | None:
    """Inputs [tokens, columns] on which roundings are compared; None where none were kept."""
    if held is None:
        return None
    now = held[1]
    return now[:: max(1, len(now) // TRIED_TOKENS)][:TRIED_TOKENS]


def unseen_error(W: Tensor, rounded: Quantized, x: Tensor) -> float:
    """``|(W - Q) x|^2`` over inputs x [tokens, columns] that the sums have not seen, some rows at a time."""
    total = 0.0
    for run in runs(W.shape[0], W.shape[1], SLAB):
        Q = rounded.grid.select_rows(run).levels().decode(rounded.codes[run].to(torch.int32))
        total += float(((W[run] - Q) @ x.T.to(W.dtype)).square_().sum(dtype=torch.float64))
    return total


def _over_hessian(left: Tensor, factor: Factor) -> Tensor:
    """``left (R R^T)^-1`` [rows, columns], R being the factor's triangle in its order."""
    solved = torch.empty_like(left)
    place = torch.argsort(factor.order)
    for start in range(0, len(left), STRIP):
        some = left[start : start + STRIP].index_select(1, factor.order).T
        half = torch.linalg.solve_triangular(factor.upper, some, upper=True)
        whole = torch.linalg.solve_triangular(factor.upper.T, half, upper=False)
        solved[start : start + STRIP] = whole.index_select(0, place).T
    return solved
