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
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from llmpack.algorithms.hessian import Factor, factorize, in_order
from llmpack.encodings.encoding import Grid, GridEncoding, Levels, Quantized
from llmpack.parallel import each, even

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llmpack.algorithms import in_turn
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")
    in_turn = LazyModule("llmpack.algorithms.in_turn")

Pieces = list[tuple[int, slice]]
"""Which rows of which matrix."""

BLOCK = 128
"""Columns rounded one by one before their errors reach the others in one matrix product."""

NUMBERS = 1 << 22
"""Weights that a thread rounds at once, as whole rows, which never see each other: this bounds memory."""

ROWS = 1024
"""Rows or columns per product where an error is evaluated."""


@dataclass(frozen=True)
class Rounded:
    """A rounded tensor.

    clipped  share of its codes that wanted to lie beyond the ends of the grid
    error    ``tr((W - Q) H (W - Q)^T)``, H not damped
    energy   ``tr(W H W^T)``
    """

    quantized: Quantized
    clipped: float
    error: float
    energy: float

    @property
    def relative_error(self) -> float:
        """The error as a share of the outputs' own energy; 0 where there is none."""
        return self.error / self.energy if self.energy > 0 else 0.0


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
    finished = [_Finished.empty(W) for W in weights]
    place = torch.argsort(factor.order)

    def rounded(pieces: Pieces) -> list[_Sums]:
        some = [grids[at].select_rows(rows) for at, rows in pieces]
        columns = _Columns.of([weights[at][rows] for at, rows in pieces], some, factor.order, factor.upper.dtype)
        codes, sums = _nearest_plane(columns, factor)
        lengths = [rows.stop - rows.start for _, rows in pieces]
        for (at, rows), part in zip(pieces, torch.split(codes, lengths, dim=1), strict=True):
            finished[at].codes[rows] = part.index_select(0, place).T
        return sums.split(lengths)

    runs = _pieces([len(W) for W in weights], rows_at_once(len(factor.order)))
    for pieces, parts in zip(runs, each(rounded, runs), strict=True):
        for (at, _), part in zip(pieces, parts, strict=True):
            finished[at].add(part)
    return [one.rounded(grid, encoding) for one, grid in zip(finished, grids, strict=True)]


def rows_at_once(columns: int) -> int:
    """Rows of so many columns that are rounded together."""
    return max(1, NUMBERS // columns)


def _pieces(lengths: Sequence[int], most: int) -> list[Pieces]:
    """Rows of matrices below each other, cut into even runs: of each run, which rows of which matrix it has."""
    starts = [0, *accumulate(lengths)]
    return [
        [
            (at, slice(max(run.start, first) - first, min(run.stop, last) - first))
            for at, (first, last) in enumerate(pairwise(starts))
            if first < run.stop and run.start < last
        ]
        for run in even(starts[-1], most)
    ]


@dataclass
class _Sums:
    """Of some rows, [rows] each: codes that were clipped, error, energy."""

    clipped: Tensor
    error: Tensor
    energy: Tensor

    def split(self, lengths: list[int]) -> list[_Sums]:
        parts = (torch.split(one, lengths) for one in (self.clipped, self.error, self.energy))
        return [_Sums(*part) for part in zip(*parts, strict=True)]


@dataclass
class _Finished:
    """A matrix whose rows are rounded some at a time."""

    codes: Tensor
    clipped: float = 0.0
    error: float = 0.0
    energy: float = 0.0

    @classmethod
    def empty(cls, W: Tensor) -> _Finished:
        return cls(torch.empty(W.shape, dtype=torch.uint8, device=W.device))

    def add(self, sums: _Sums) -> None:
        """Count some rows, whose codes are there."""
        self.clipped += float(sums.clipped.sum())
        self.error += float(sums.error.sum())
        self.energy += float(sums.energy.sum())

    def rounded(self, grid: Grid, encoding: GridEncoding) -> Rounded:
        quantized = Quantized(self.codes, grid, encoding)
        return Rounded(quantized, self.clipped / max(1, self.codes.numel()), max(0.0, self.error), self.energy)


def refine(W: Tensor, H: Tensor, start: Quantized, *, sweeps: int = 4) -> Quantized:
    """Coordinate descent on the codes: each column in turn takes its best code given all others.

    The objective never grows. A sweep costs as much as GPTQ; it stops early when no code changes.
    H should be the damped one where `start` came from it. Columns go from the largest
    mean squared input to the smallest.
    """
    order = torch.argsort(torch.diagonal(H), descending=True, stable=True)
    hessian, place = in_order(H, order, W.dtype), torch.argsort(order)
    refined = torch.empty(start.codes.shape, dtype=torch.uint8, device=W.device)

    def descend(rows: slice) -> None:
        columns = _Columns.of([W[rows]], [start.grid.select_rows(rows)], order, W.dtype)
        codes = start.codes[rows].to(torch.uint8).T.index_select(0, order).contiguous()
        for _ in range(sweeps):
            if not _descend(columns, hessian, codes):
                break
        refined[rows] = codes.index_select(0, place).T

    each(descend, even(len(W), rows_at_once(len(order))))
    return Quantized(refined, start.grid, start.encoding)


def objective(W: Tensor, Q: Tensor, H: Tensor, dtype: torch.dtype | None = None) -> float:
    """``tr((W - Q) H (W - Q)^T)``: expected squared error of the outputs, summed over rows.

    dtype  of the products, float64 unless told; they are summed in float64
    """
    total = 0.0
    for rows in range(0, len(W), ROWS):
        error = (W[rows : rows + ROWS] - Q[rows : rows + ROWS]).to(dtype or torch.float64)
        for columns in range(0, len(H), ROWS):
            some = slice(columns, columns + ROWS)
            product = error @ H[:, some].to(error.dtype)
            total += float(product.mul_(error[:, some]).sum(dtype=torch.float64))
    return total


def relative_error(W: Tensor, Q: Tensor, H: Tensor) -> float:
    """The objective as a share of the outputs' own energy ``tr(W H W^T)``; 0 where there is none."""
    energy = objective(W, torch.zeros_like(W), H)
    return objective(W, Q, H) / energy if energy > 0 else 0.0


@dataclass
class _Columns:
    """Weights and grids with columns as contiguous vectors, in rounding order, the rows of all matrices stacked."""

    order: Tensor
    weight: Tensor  # [columns, all rows]
    grids: Sequence[Grid]

    @classmethod
    def of(cls, weights: Sequence[Tensor], grids: Sequence[Grid], order: Tensor, dtype: torch.dtype) -> _Columns:
        stacked = torch.cat([w.to(dtype) for w in weights])
        return cls(order, stacked.T.index_select(0, order).contiguous(), grids)

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


def _round_block(levels: Levels, slope: Tensor, weight: Tensor, target: Tensor, error: Tensor) -> Tensor:
    """Round the columns of one block in turn, [n, rows] each; codes, uint8.

    slope   [n, n]: what a unit of error in column j adds to column k, at [k, j] with j < k
    weight  what errors are taken from
    target  what each column is to be rounded from, as far as it follows from the blocks before; made whole
    error   filled
    """
    multiples = torch.empty_like(weight)
    ends = [torch.as_tensor(end, dtype=weight.dtype) for end in levels.ends]
    table = weight.new_empty(0) if levels.table is None else levels.table.to(weight.dtype)
    arrays = (
        slope.contiguous(),
        target,
        weight,
        levels.scale,
        weight.new_zeros(1, 1) if levels.offset is None else levels.offset,
        *(end if end.ndim else end.view(1, 1) for end in ends),
        (table[1:] + table[:-1]) / 2,
        table,
        error,
        multiples,
    )
    in_turn.round_in_turn(*(array.numpy() for array in arrays))
    return levels.codes_of(multiples)


def _nearest_plane(columns: _Columns, factor: Factor) -> tuple[Tensor, _Sums]:
    """Round all rows of `columns`: codes [columns, rows] in rounding order, uint8, and their sums.

    With ``H = R R^T`` the objective is the squared length of ``(W - Q) R``. R being upper triangular, entry k
    depends on columns up to k only, and is smallest when column k is rounded from
    ``W_k + sum_{j<k} (W_j - Q_j) R_jk / R_kk``. What is left there, times R_kk, is that entry: the objective is known
    at the end at no cost, but for what damping added.
    """
    weight, upper = columns.weight, factor.upper
    count, rows = weight.shape
    diagonal = torch.diagonal(upper)
    error = torch.empty_like(weight)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    sums = torch.zeros(3, rows, dtype=torch.float64, device=weight.device)
    clipped, missed, energy = sums
    for start in range(0, count, BLOCK):
        some = slice(start, min(start + BLOCK, count))
        levels = columns.levels(some.start, some.stop)
        size, added = diagonal[some, None], factor.added[some, None].to(weight.dtype)
        target = (upper[:start, some].T @ error[:start]).div_(size).add_(weight[some])
        slope = upper[some, some].T / size  # slope[k - start, j - start] = R_jk / R_kk
        codes[some] = _round_block(levels, slope, weight[some], target, error[some])
        left = target - (weight[some] - error[some])
        clipped += _beyond_the_ends(levels, codes[some], left).sum(0)
        missed += _squares(left, size.square()) - _squares(error[some], added)
        energy += _squares(upper[: some.stop, some].T @ weight[: some.stop]) - _squares(weight[some], added)
    return codes, _Sums(clipped, missed, energy)


def _squares(values: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """[rows] float64: sum over columns of weighted squares; values [columns, rows], weights [columns, 1]."""
    return (values.square() * weights).sum(0, dtype=torch.float64)


def _beyond_the_ends(levels: Levels, codes: Tensor, left: Tensor) -> Tensor:
    """Where the outermost code was taken for a value more than half a step beyond it; `left` is what it missed."""
    table = levels.table
    below, above = (1, 1) if table is None else (float(table[1] - table[0]), float(table[-1] - table[-2]))
    steps = (left / levels.divisor).abs_().mul_(2)
    return ((codes == 0) & (steps > below)) | ((codes == levels.high) & (steps > above))


def _descend(columns: _Columns, hessian: Tensor, codes: Tensor) -> bool:
    """One sweep of coordinate descent over `codes`, in place; whether any code changed."""
    weight = columns.weight
    count = weight.shape[0]
    curvature = torch.diagonal(hessian).clone()
    curvature[curvature <= 0] = torch.inf  # a column that matters to nothing stays near where it is
    pull = torch.empty_like(weight)
    for start in range(0, count, BLOCK):
        some = slice(start, min(start + BLOCK, count))
        torch.sub(weight[some], columns.levels(some.start, some.stop).decode(codes[some]), out=pull[some])
    pull = hessian @ pull  # half the gradient by each column
    changed = False
    for start in range(0, count, BLOCK):
        some = slice(start, min(start + BLOCK, count))
        levels = columns.levels(some.start, some.stop)
        now, stiff = levels.decode(codes[some]), curvature[some, None]
        # where each column is best while no other of the block moves; what it falls by moves those after it
        target, moved = now + pull[some] / stiff, torch.empty_like(now)
        best = _round_block(levels, hessian[some, some] / stiff, now, target, moved)
        changed = changed or not torch.equal(best, codes[some])
        codes[some] = best
        pull[some.stop :].addmm_(hessian[some.stop :, some], moved)
    return changed
