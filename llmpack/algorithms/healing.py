"""A matrix changed so that its block ends where the removed blocks would have led: ridge least squares.

Where blocks are taken away, the hidden states miss what those blocks added, e. What the block before the gap can
predict of it from the input a of its last matrix W is added to that matrix: the ``D`` that is nearest to e, damped, is
``E[e a^T] (E[a a^T] + penalty)^-1`` (`llmpack.algorithms.ridge`), and W becomes ``W + D``. ReplaceMe (2025,
arXiv:2505.02819) solves for a map T of the outputs ``W a`` instead, which is the special case ``D = (T - 1) W``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")


def gains(power: Tensor, cross: Tensor, damping: float) -> Tensor:
    """``g`` [columns] float64 such that ``g_c o_c`` is nearest to ``e_c``, each channel for itself.

    For families that norm what they add to the hidden states: nothing but the norm's weights scales it there.

    power    [columns] ``E[o_c^2]``
    cross    [columns] ``E[e_c o_c]``
    damping  share of its mean square that is added to each channel
    """
    wide = power.to(torch.float64)
    return cross.to(torch.float64) / (wide * (1 + damping)).clamp_min(torch.finfo(torch.float64).tiny)
