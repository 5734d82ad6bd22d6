"""What rounding a matrix does to the predictions of the whole model, to second order.

For weights changed by ``dW`` the mean Kullback-Leibler divergence per token from the model as it was is
``1/2 dW^T F dW`` with F the Fisher matrix of the model's own predictions (the first order is zero at the weights
themselves). Taken apart as K-FAC does, with the diagonal of the outputs' side::

    1/2 sum_o G_o dW_o H dW_o^T      G_o = E[g_o^2],  H = E[x x^T]

where g is the gradient of the loss by the matrix's output, with labels drawn from the model itself. So one backward
pass serves for every candidate encoding of every matrix.

Martens and Grosse 2015, arXiv:1503.05671; Kunstner et al. 2019, arXiv:1905.12558, on why labels must be drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmpack.algorithms.hessian import Factor

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")


class SquareSum:
    """Running sum of ``g_o^2`` over tokens for every output row, float64."""

    def __init__(self, rows: int) -> None:
        self.tokens = 0
        self._sum = torch.zeros(rows, dtype=torch.float64)

    def add(self, gradient: Tensor) -> None:
        """Add gradients [..., rows]; every leading index is a token."""
        flat = gradient.detach().reshape(-1, self._sum.shape[0])
        self._sum += flat.float().square().sum(0).double().cpu()
        self.tokens += flat.shape[0]

    def mean(self) -> Tensor:
        """``E[g_o^2]`` [rows] float64."""
        return self._sum / max(1, self.tokens)


class Peak:
    """The largest number of an input, for comparison with its root mean square."""

    def __init__(self) -> None:
        self.largest = 0.0

    def add(self, x: Tensor) -> None:
        """Look at inputs of any shape."""
        self.largest = max(self.largest, float(x.detach().abs().max()))


def draw_labels(logits: Tensor, uniform: Tensor) -> Tensor:
    """[n] int64: labels drawn from the predictions of logits [n, V], one for each number [n] between 0 and 1."""
    cumulative = torch.softmax(logits.double(), dim=-1).cumsum(-1)
    wanted = (uniform.double() * cumulative[:, -1]).unsqueeze(1)
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(1).clamp_(max=logits.shape[-1] - 1)


@dataclass(frozen=True)
class RowSample:
    """Some rows of a matrix, and how many rows each of them stands for.

    rows     [n] int64, ascending
    weights  [n] float64; the weighted sum over the sample estimates the sum over all rows
    """

    rows: Tensor
    weights: Tensor


def sample_rows(sizes: Tensor, count: int) -> RowSample:
    """At most `count` rows, taken in proportion to what they are expected to contribute.

    sizes  [rows], not negative, roughly proportional to each row's contribution

    Systematic sampling: rows that would be taken more than once are taken once for certain, the others at equal steps
    along their running sum. No chance is involved. Rows of size zero stand for nothing and are not taken.
    """
    total = sizes.shape[0]
    if count >= total:
        return RowSample(torch.arange(total), torch.ones(total, dtype=torch.float64))
    sizes = sizes.to(torch.float64)
    certain = torch.zeros(total, dtype=torch.bool)
    while True:
        rest = torch.where(certain, 0.0, sizes)
        left = count - int(certain.sum())
        more = (rest * left >= rest.sum()) & (rest > 0)
        if left <= 0 or not bool(more.any()):
            break
        certain |= more
    weights = certain.to(torch.float64)
    if left > 0 and float(rest.sum()) > 0:
        step = rest.sum() / left
        picked = torch.searchsorted(rest.cumsum(0), (torch.arange(left, dtype=torch.float64) + 0.5) * step)
        picked = picked.clamp_(max=total - 1)
        weights[picked] = step / rest[picked]
    rows = torch.nonzero(weights > 0).squeeze(1)
    return RowSample(rows, weights[rows])


def predicted_divergence(dW: Tensor, H: Tensor, weights: Tensor) -> float:
    """``1/2 sum_o G_o dW_o H dW_o^T``, nats per token.

    dW       [rows, columns] change of the weights
    H        [columns, columns] ``E[x x^T]``
    weights  [rows] float64, ``G_o`` (times the rows that row o stands for)
    """
    each = ((dW @ H.to(dW.dtype)) * dW).sum(1, dtype=torch.float64)
    return float(0.5 * (each * weights).sum())


def compensated_divergence(dW: Tensor, leverage: Tensor, weights: Tensor) -> float:
    """The same as to be expected once GPTQ lets later columns absorb the errors of earlier ones.

    dW        [rows, columns] errors of rounding to nearest under the same scales
    leverage  [columns], see `leverage`

    GPTQ rounds column k from a shifted target, with an error of the same size as that of rounding to nearest; what the
    columns after it cannot absorb of it is its square times ``R_kk^2``.
    """
    each = dW.square().to(torch.float64) @ leverage.to(torch.float64)
    return float(0.5 * (each * weights).sum())


def leverage(factor: Factor, H: Tensor) -> Tensor:
    """[columns] float64: what each column's squared error costs when the columns rounded after it absorb what they can.

    factor  of H; damping is taken off again, since it is no error of the outputs
    """
    diagonal = torch.diagonal(H).to(torch.float64)
    alive = diagonal[diagonal > 0]
    added = factor.damping * float(alive.mean()) if alive.numel() else 0.0
    kept = (torch.diagonal(factor.upper).to(torch.float64).square() - added).clamp_(min=0.0)
    return torch.where(diagonal > 0, torch.empty_like(kept).index_copy_(0, factor.order, kept), 0.0)


def concentration(H: Tensor, share: float = 0.01) -> float:
    """Share of an input's energy (0 to 1) in the strongest columns, a hundredth of them unless told; at least one."""
    diagonal = torch.diagonal(H).to(torch.float64)
    count = max(1, int(share * diagonal.shape[0]))
    total = float(diagonal.sum())
    return float(torch.topk(diagonal, count).values.sum()) / total if total > 0 else 0.0
