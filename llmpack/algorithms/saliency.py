"""How little a run of blocks changes the hidden states that pass through it, token by token."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")


def cosines(before: Tensor, after: Tensor) -> Tensor:
    """[...] float64: cosine of each token's states [..., D] before and after."""
    x, y = before.to(torch.float64), after.to(torch.float64)
    sizes = (x.norm(dim=-1) * y.norm(dim=-1)).clamp_min(torch.finfo(torch.float64).tiny)
    found: Tensor = ((x * y).sum(-1) / sizes).clamp_(-1, 1)
    return found


def influence(before: Tensor, after: Tensor) -> float:
    """Block influence: ``1 - E[cos]`` over all tokens (Men et al. 2024, arXiv:2403.03853)."""
    return 1.0 - float(cosines(before, after).mean())


def angular_distance(before: Tensor, after: Tensor) -> float:
    """``E[arccos(cos)] / pi`` over the last tokens of sequences [N, T, D] (Gromov et al. 2024, arXiv:2403.17887)."""
    return float(torch.arccos(cosines(before[:, -1], after[:, -1])).mean()) / math.pi
