"""Ridge least squares from second moments, each input damped by a share of its own size.

The inputs of a feed-forward part's last matrix differ in size by orders of magnitude. A penalty that is the same for
all of them, a share of the mean square of all (GPTQ's damping), leaves the few largest undamped and silences the rest.
Here the penalty of an input is a share of its own mean square, so that the result does not depend on the units in
which inputs are measured (Hoerl and Kennard 1970 scale to correlations for the same reason).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmpack.algorithms.hessian import factorize

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")


def ridge_regression(cross: Tensor, H: Tensor, damping: float) -> Tensor:
    """``cross (H + damping diag(H))^-1`` [rows, columns] float64: with ``cross = E[y x^T]`` what maps x nearest to y.

    H        [columns, columns] ``E[x x^T]``; inputs that are always zero are mapped to nothing
    cross    [rows, columns]
    damping  share of the mean square of each input that is added to it

    Memory beside the arguments: H twice in float64. Raises NumericalError where H does not factor at any damping.
    """
    scaled = H.to(torch.float64, copy=True)
    size = torch.diagonal(scaled).clamp_min(0).sqrt()
    size = torch.where(size > 0, size, 1.0)
    # With ones on the diagonal, a share of its mean is a share of each.
    scaled.div_(size).div_(size[:, None])
    upper = factorize(scaled, damping, "natural", overwrite=True).upper
    return divided(cross.to(torch.float64) / size, upper).div_(size)


def divided(left: Tensor, upper: Tensor) -> Tensor:
    """``left (R R^T)^-1`` [rows, columns] for an upper triangular R [columns, columns], both float64."""
    half = torch.linalg.solve_triangular(upper, left.T, upper=True)
    found: Tensor = torch.linalg.solve_triangular(upper.T, half, upper=False).T
    return found
