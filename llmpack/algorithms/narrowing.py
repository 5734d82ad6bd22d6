"""Which columns of a matrix to do without, and what the others then have to be.

For ``y = W x`` with ``H = E[x x^T]``, keep the columns S and let the rest R go. The least squared error of the
outputs is reached by ``V = W_S + W_R H_RS H_SS^-1``: what R carried is read from S as far as S predicts it (the
Nystroem approximation of x; MoDeGPT, Lin et al. 2024, arXiv:2408.09632). Which columns hurt least when the others
make up for them is the question that Optimal Brain Surgeon answers (Hassibi and Stork 1993): column j costs ``|W_j|^2
/ (H^-1)_jj``. Once it is gone, W and H^-1 are those of what is left, and the next is chosen (SlimGPT, Ling et al.
2024, arXiv:2412.18110).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmpack.algorithms.ridge import ridge_regression

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

ROUNDS = 32
"""Into how many looks a choice is split at most: columns that cost least in one look go together."""


def costs(W: Tensor, inverse: Tensor, unit: int) -> Tensor:
    """[columns / unit] float64: what each unit of neighbouring columns costs when all others make up for it.

    inverse  ``H^-1`` [columns, columns]
    """
    units = W.shape[1] // unit
    corner = inverse.reshape(units, unit, units, unit).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    by_unit = W.reshape(-1, units, unit).permute(1, 2, 0)
    found: Tensor = (by_unit * torch.linalg.solve(corner, by_unit)).sum((1, 2))
    return found


def energies(W: Tensor, H: Tensor, unit: int) -> Tensor:
    """[columns / unit] float64: the mean square of what each unit adds to the outputs, if nothing makes up for it."""
    units = W.shape[1] // unit
    corner = H.to(torch.float64).reshape(units, unit, units, unit).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    by_unit = W.to(torch.float64).reshape(-1, units, unit).permute(1, 2, 0)
    found: Tensor = (by_unit * (corner @ by_unit)).sum((1, 2))
    return found


def inverse_of(H: Tensor, damping: float) -> Tensor:
    """``(H + damping diag(H))^-1`` float64. Raises NumericalError as `ridge_regression` does."""
    return ridge_regression(torch.eye(H.shape[0], dtype=torch.float64, device=H.device), H, damping)


def choose(W: Tensor, H: Tensor, unit: int, keep: int, damping: float, *, rounds: int = ROUNDS) -> Tensor:
    """[keep] int64, ascending: the units of `unit` neighbouring columns to keep, the others making up for the rest.

    W       [rows, columns]
    H       [columns, columns]
    rounds  looks at most; as many as units go for the greedy choice one by one
    """
    inverse, wide = inverse_of(H, damping), W.to(torch.float64).clone()
    units = W.shape[1] // unit
    left = torch.arange(units, device=W.device)
    while len(left) > keep:
        batch = min(max(1, -(-(units - keep) // rounds)), len(left) - keep)
        going = torch.argsort(costs(wide, inverse, unit), stable=True)[:batch]
        stays = torch.ones(len(left), dtype=torch.bool, device=W.device)
        stays[going] = False
        wide, inverse = _without(wide, inverse, stays.repeat_interleave(unit))
        left = left[stays]
    return left


def _without(W: Tensor, inverse: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """Best W and ``H^-1`` once some columns are gone: one step of block elimination."""
    corner = inverse[~stays][:, ~stays]
    across = torch.linalg.solve(corner, inverse[~stays][:, stays])
    return (
        W[:, stays] - W[:, ~stays] @ across,
        inverse[stays][:, stays] - inverse[stays][:, ~stays] @ across,
    )


def compensated(W: Tensor, H: Tensor, stays: Tensor, damping: float) -> Tensor:
    """``V`` [rows, kept] float64 that reads the columns `stays` and comes nearest to ``W x``.

    stays    [kept] int64
    damping  share of its mean square that is added to each column: pulls V towards the columns as they were
    """
    wide = W.to(torch.float64)
    gone = torch.ones(W.shape[1], dtype=torch.bool, device=W.device)
    gone[stays] = False
    kept = wide[:, stays]
    if not bool(gone.any()):
        return kept
    lost = wide[:, gone] @ H[gone][:, stays].to(torch.float64)
    return kept + ridge_regression(lost, H[stays][:, stays], damping)
