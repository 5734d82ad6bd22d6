"""A matrix changed so that its block ends where the removed blocks would have led: ridge least squares.

Where blocks are taken away, the hidden states miss what those blocks added, e. What the block before the gap can
predict of it from the input a of its last matrix W is added to that matrix: the ``D`` that minimizes ``E |e - D a|^2
+ level |D|^2`` is ``E[e a^T] (E[a a^T] + level)^-1``, and W becomes ``W + D``. ReplaceMe (2025,
arXiv:2505.02819) solves for a map T of the outputs ``W a`` instead, which is the special case ``D = (T - 1) W``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmpack.algorithms.hessian import factorize
from llmpack.algorithms.ridge import divided

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")


def predicted_by(H: Tensor, cross: Tensor, damping: float) -> Tensor:
    """``D`` [rows, columns] float64 with ``D a`` nearest to e.

    H        [columns, columns] ``E[a a^T]``
    cross    [rows, columns] ``E[e a^T]``
    damping  share of the mean of H's diagonal that is added to it: directions that hardly occur stay as they are

    Raises NumericalError where H does not factor at any damping.
    """
    return divided(cross.to(torch.float64), factorize(H, damping, "natural").upper)


def gains(power: Tensor, cross: Tensor, damping: float) -> Tensor:
    """``g`` [columns] float64 such that ``g_c o_c`` is nearest to ``e_c``: `predicted_by`, each channel for itself.

    For families that norm what they add to the hidden states: nothing but the norm's weights scales it there.

    power  [columns] ``E[o_c^2]``
    cross  [columns] ``E[e_c o_c]``
    """
    wide = power.to(torch.float64)
    return cross.to(torch.float64) / (wide + damping * wide.mean()).clamp_min(torch.finfo(torch.float64).tiny)
