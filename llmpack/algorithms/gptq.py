"""Error-compensated rounding on a fixed grid (GPTQ), and coordinate descent on its codes.

Both lower ``tr((W - Q) H (W - Q)^T)`` over codes; the grid's scales stay as they are. Since every scale
is known before the first column is rounded, columns may be taken in any order at no cost for the file:
what the GPTQ literature calls static groups with act-order.

Frantar et al. 2022, arXiv:2210.17323; the form used here is Babai's nearest plane algorithm on the
triangular factor of H, to which GPTQ is equal column by column (arXiv:2507.18553).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmpack.algorithms.hessian import Factor, factorize
from llmpack.encodings.encoding import Grid, GridEncoding, Levels, Quantized

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

BLOCK = 128
"""Columns rounded one by one before their errors reach the others in one matrix product."""


@dataclass(frozen=True)
class Rounded:
    """A rounded tensor, and the share of its codes that wanted to lie beyond the ends of the grid."""

    quantized: Quantized
    clipped: float


def gptq(
    W: Tensor,
    H: Tensor,
    grid: Grid,
    encoding: GridEncoding,
    *,
    damping: float = 0.01,
    order: str = "activation",
) -> Quantized:
    """Round `W` [rows, columns] on `grid` so that later columns absorb the errors of earlier ones.

    H        [columns, columns], ``E[x x^T]`` of the inputs
    damping  fraction of the mean of H's diagonal added to it
    order    "activation" (largest mean squared input first) or "natural"

    Raises NumericalError when H does not factor.
    """
    factor = factorize(H, damping, order)
    return round_together([W], factor, [grid], encoding)[0].quantized


def round_together(
    weights: Sequence[Tensor], factor: Factor, grids: Sequence[Grid], encoding: GridEncoding
) -> list[Rounded]:
    """GPTQ of matrices that read the same input and have one encoding, in one pass.

    Rows never see each other, so the result is that of one matrix after the other. The arithmetic
    runs in the precision of ``factor.upper``: float32 is up to a third faster, and lets about one code
    in a hundred thousand fall to the other side of a tie, after which the rest of its row differs.
    """
    if encoding.joint_columns != 1:
        raise ValueError(f"{encoding.name} has codes that span {encoding.joint_columns} columns; GPTQ needs one")
    columns = _Columns.of(weights, grids, factor.order, factor.upper.dtype)
    codes, clipped = _nearest_plane(columns, factor.upper)
    return _split(columns, codes, clipped, grids, encoding)


def refine(W: Tensor, H: Tensor, start: Quantized, *, sweeps: int = 4) -> Quantized:
    """Coordinate descent on the codes: each column in turn takes its best code given all others.

    The objective never grows. A sweep costs as much as GPTQ; it stops early when no code changes.
    H should be the damped one where `start` came from it. Columns go from the largest
    mean squared input to the smallest.
    """
    order = torch.argsort(torch.diagonal(H), descending=True, stable=True)
    columns = _Columns.of([W], [start.grid], order, W.dtype)
    hessian = H.to(W.dtype).index_select(0, order).index_select(1, order)
    codes = start.codes.to(torch.int32).T.index_select(0, order).contiguous()
    for _ in range(sweeps):
        if not _descend(columns, hessian, codes):
            break
    return _split(columns, codes, torch.zeros_like(codes, dtype=torch.bool), [start.grid], start.encoding)[0].quantized


def objective(W: Tensor, Q: Tensor, H: Tensor) -> float:
    """``tr((W - Q) H (W - Q)^T)``: expected squared error of the outputs, summed over rows (float64)."""
    error = (W - Q).to(torch.float64)
    return float(((error @ H.to(torch.float64)) * error).sum())


def relative_error(W: Tensor, Q: Tensor, H: Tensor) -> float:
    """The objective as a share of the outputs' own energy ``tr(W H W^T)``; 0 where there is none."""
    energy = objective(W, torch.zeros_like(W), H)
    return objective(W, Q, H) / energy if energy > 0 else 0.0


@dataclass
class _Columns:
    """Weights and grids with columns as contiguous vectors, in rounding order, all rows stacked."""

    order: Tensor
    weight: Tensor  # [columns, all rows]
    grids: Sequence[Grid]
    rows: list[int]

    @classmethod
    def of(cls, weights: Sequence[Tensor], grids: Sequence[Grid], order: Tensor, dtype: torch.dtype) -> _Columns:
        stacked = torch.cat([w.to(dtype) for w in weights])
        weight = stacked.T.index_select(0, order).contiguous()
        return cls(order, weight, grids, [w.shape[0] for w in weights])

    def levels(self, start: int, stop: int) -> Levels:
        """Levels of the start-th to stop-th column in rounding order, as [columns, all rows]."""
        some = [grid.levels(self.order[start:stop]).to(self.weight.dtype) for grid in self.grids]
        first = some[0]
        zero: int | Tensor = first.zero
        if any(not isinstance(levels.zero, int) for levels in some):
            zero = torch.cat([torch.as_tensor(levels.zero).expand_as(levels.scale) for levels in some]).T.contiguous()
        offset = None
        if first.offset is not None:
            offset = torch.cat([levels.offset for levels in some if levels.offset is not None]).T.contiguous()
        scale = torch.cat([levels.scale for levels in some]).T.contiguous()
        return Levels(scale=scale, high=first.high, zero=zero, offset=offset, table=first.table)


def _vector(levels: Levels, index: int) -> Levels:
    """The levels of one column out of those of `_Columns.levels`."""
    return Levels(
        scale=levels.scale[index],
        high=levels.high,
        zero=levels.zero if isinstance(levels.zero, int) else levels.zero[index],
        offset=None if levels.offset is None else levels.offset[index],
        table=levels.table,
    )


def _nearest_plane(columns: _Columns, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, and where they clipped; both [columns, rows] in rounding order.

    With ``H = R R^T`` the objective is the squared length of ``(W - Q) R``. R being upper triangular, entry k
    depends on columns up to k only, and is smallest when column k is rounded from
    ``W_k + sum_{j<k} (W_j - Q_j) R_jk / R_kk``.
    """
    weight = columns.weight
    count = weight.shape[0]
    slope = (upper / torch.diagonal(upper)).T.contiguous()  # slope[k, j] = R_jk / R_kk
    error = torch.empty_like(weight)
    codes = torch.empty(weight.shape, dtype=torch.int32, device=weight.device)
    clipped = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        levels = columns.levels(start, stop)
        target = torch.addmm(weight[start:stop], slope[start:stop, :start], error[:start])
        for k in range(start, stop):
            level = _vector(levels, k - start)
            wanted = target[k - start]
            if k > start:
                wanted.addmv_(error[start:k].T, slope[k, start:k])
            codes[k] = level.round(wanted)
            torch.sub(weight[k], level.decode(codes[k]), out=error[k])
        clipped[start:stop] = _beyond_the_ends(levels, codes[start:stop], target)
    return codes, clipped


def _beyond_the_ends(levels: Levels, codes: Tensor, target: Tensor) -> Tensor:
    """Where the outermost code was taken for a value more than half a step beyond it."""
    lowest, highest = torch.zeros_like(codes), torch.full_like(codes, levels.high)
    below = (levels.decode(lowest + 1) - levels.decode(lowest)).abs() / 2
    above = (levels.decode(highest) - levels.decode(highest - 1)).abs() / 2
    missed = (target - levels.decode(codes)).abs()
    return ((codes == 0) & (missed > below)) | ((codes == levels.high) & (missed > above))


def _descend(columns: _Columns, hessian: Tensor, codes: Tensor) -> bool:
    """One sweep of coordinate descent over `codes`, in place; whether any code changed."""
    weight = columns.weight
    count = weight.shape[0]
    curvature = torch.diagonal(hessian)
    error = torch.empty_like(weight)
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        error[start:stop] = weight[start:stop] - columns.levels(start, stop).decode(codes[start:stop])
    pull = hessian @ error  # half the gradient by each column
    changed = False
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        levels = columns.levels(start, stop)
        moved = torch.zeros_like(error[start:stop])
        for k in range(start, stop):
            if curvature[k] <= 0:
                continue
            i = k - start
            level = _vector(levels, i)
            slope = torch.addmv(pull[k], moved[:i].T, hessian[k, start:k])
            best = level.round(weight[k] - error[k] + slope / curvature[k])
            now = weight[k] - level.decode(best)
            moved[i] = now - error[k]
            changed = changed or not torch.equal(best, codes[k])
            error[k], codes[k] = now, best
        pull.addmm_(hessian[:, start:stop], moved)
    return changed


def _split(
    columns: _Columns, codes: Tensor, clipped: Tensor, grids: Sequence[Grid], encoding: GridEncoding
) -> list[Rounded]:
    """Back to checkpoint layout, one result per matrix."""
    inverse = torch.argsort(columns.order)
    parts = torch.split(codes.index_select(0, inverse).T, columns.rows)
    shares = torch.split(clipped.sum(0, dtype=torch.float64), columns.rows)
    return [
        Rounded(Quantized(part.contiguous(), grid, encoding), float(share.mean()) / codes.shape[0])
        for part, grid, share in zip(parts, grids, shares, strict=True)
    ]
