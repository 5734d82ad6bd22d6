"""Weights adjusted to inputs that earlier rounding has moved.

A matrix that should turn r into ``W r`` receives x, since the matrices before it were rounded. The
``V`` that minimizes ``E |W r - V x|^2`` is ``W E[r x^T] E[x x^T]^-1``; rounding V instead of W lets this
matrix make up for what it can predict of the errors before it. GPTAQ (Li et al. 2025,
arXiv:2504.02692) adds the same term column by column inside GPTQ; on fixed scales it can be taken
beforehand, in closed form, and the scales are then fitted to what is rounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmpack.algorithms.hessian import Factor

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")


def drift_map(H: Tensor, cross: Tensor, factor: Factor) -> Tensor:
    """``D`` [columns, columns] float64 such that ``W + W D`` is the best matrix for the moved inputs.

    H       ``E[x x^T]`` of the inputs as they are
    cross   ``E[r x^T]``, r being the inputs as they were
    factor  of the damped H: damping keeps directions that hardly occur as they are

    ``D = (E[r x^T] - H) (H + damping)^-1``; zero where nothing has moved.
    """
    moved = (cross.to(torch.float64) - H.to(torch.float64)).index_select(1, factor.order)
    upper = factor.upper.to(torch.float64)
    half = torch.linalg.solve_triangular(upper, moved.T, upper=True)
    solved: Tensor = torch.linalg.solve_triangular(upper.T, half, upper=False).T
    return solved.index_select(1, torch.argsort(factor.order))


def follow(W: Tensor, drift: Tensor, strength: float) -> Tensor:
    """``W + strength * W D`` in the dtype of W.

    The whole of it minimizes the error of this matrix alone, but least squares shrinks what it predicts from
    noisy inputs, and shrinking in every layer adds up; part of it is better for the model.
    """
    wide = W.to(torch.float64)
    return wide.addmm(wide, drift, alpha=strength).to(W.dtype)
