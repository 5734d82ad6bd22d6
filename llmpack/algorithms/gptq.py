"""Error-compensated rounding on a fixed grid (GPTQ), and coordinate descent on its codes.

Both lower ``tr((W - Q) H (W - Q)^T)`` over codes; the grid's scales stay as they are. Since every scale
is known before the first column is rounded, columns may be taken in any order at no cost for the file:
what the GPTQ literature calls static groups with act-order.

Frantar et al. 2022, arXiv:2210.17323; the form used here is Babai's nearest plane algorithm on the
triangular factor of H, to which GPTQ is equal column by column (arXiv:2507.18553).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmpack.algorithms.hessian import Factor, factorize, in_order
from llmpack.encodings.encoding import Grid, GridEncoding, Levels, Quantized

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

BLOCK = 128
"""Columns rounded one by one before their errors reach the others in one matrix product."""

ROWS = 2048
"""Rows that are rounded at once. Rows never see each other: this bounds memory, and keeps a block of columns in a
core's cache."""


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
    for pieces in _pieces([len(W) for W in weights]):
        some = [grids[at].select_rows(rows) for at, rows in pieces]
        columns = _Columns.of([weights[at][rows] for at, rows in pieces], some, factor.order, factor.upper.dtype)
        tile = _nearest_plane(columns, factor)
        lengths = [rows.stop - rows.start for _, rows in pieces]
        for (at, rows), part in zip(pieces, tile.split(lengths), strict=True):
            finished[at].take(rows, part, place)
    return [one.rounded(grid, encoding) for one, grid in zip(finished, grids, strict=True)]


def _pieces(lengths: Sequence[int]) -> Iterator[list[tuple[int, slice]]]:
    """Rows of matrices, gathered into runs of at most `ROWS`: (matrix, its rows)."""
    run: list[tuple[int, slice]] = []
    room = ROWS
    for at, length in enumerate(lengths):
        start = 0
        while start < length:
            stop = min(length, start + room)
            run.append((at, slice(start, stop)))
            room -= stop - start
            start = stop
            if room == 0:
                yield run
                run, room = [], ROWS
    if run:
        yield run


@dataclass
class _Tile:
    """Some rows, rounded: codes [columns, rows] in rounding order; what was clipped, error and energy by row."""

    codes: Tensor
    clipped: Tensor
    error: Tensor
    energy: Tensor

    def split(self, lengths: list[int]) -> list[_Tile]:
        parts = zip(
            torch.split(self.codes, lengths, dim=1),
            *(torch.split(one, lengths) for one in (self.clipped, self.error, self.energy)),
            strict=True,
        )
        return [_Tile(*part) for part in parts]


@dataclass
class _Finished:
    """A matrix whose rows are rounded tile by tile."""

    codes: Tensor
    clipped: float = 0.0
    error: float = 0.0
    energy: float = 0.0

    @classmethod
    def empty(cls, W: Tensor) -> _Finished:
        return cls(torch.empty(W.shape, dtype=torch.uint8, device=W.device))

    def take(self, rows: slice, tile: _Tile, place: Tensor) -> None:
        self.codes[rows] = tile.codes.index_select(0, place).T
        self.clipped += float(tile.clipped.sum())
        self.error += float(tile.error.sum())
        self.energy += float(tile.energy.sum())

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
    for first in range(0, len(W), ROWS):
        rows = slice(first, min(first + ROWS, len(W)))
        columns = _Columns.of([W[rows]], [start.grid.select_rows(rows)], order, W.dtype)
        codes = start.codes[rows].to(torch.int32).T.index_select(0, order).contiguous()
        for _ in range(sweeps):
            if not _descend(columns, hessian, codes):
                break
        refined[rows] = codes.index_select(0, place).T
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


def _vector(levels: Levels, index: int) -> Levels:
    """The levels of one column out of those of `_Columns.levels`."""
    return Levels(
        scale=levels.scale[index],
        high=levels.high,
        zero=levels.zero if isinstance(levels.zero, int) else levels.zero[index],
        offset=None if levels.offset is None else levels.offset[index],
        table=levels.table,
    )


def _nearest_plane(columns: _Columns, factor: Factor) -> _Tile:
    """Round all rows of `columns`.

    With ``H = R R^T`` the objective is the squared length of ``(W - Q) R``. R being upper triangular, entry k
    depends on columns up to k only, and is smallest when column k is rounded from
    ``W_k + sum_{j<k} (W_j - Q_j) R_jk / R_kk``. What is left there, times R_kk, is that entry: the objective is known
    at the end at no cost, but for what damping added.
    """
    weight, upper = columns.weight, factor.upper
    count, rows = weight.shape
    diagonal = torch.diagonal(upper)
    error = torch.empty_like(weight)
    codes = torch.empty(weight.shape, dtype=torch.int32, device=weight.device)
    sums = torch.zeros(3, rows, dtype=torch.float64, device=weight.device)
    clipped, missed, energy = sums
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        levels = columns.levels(start, stop)
        size = diagonal[start:stop]
        slope = (upper[:stop, start:stop] / size).T.contiguous()  # slope[k - start, j] = R_jk / R_kk
        target = torch.addmm(weight[start:stop], slope[:, :start], error[:start])
        _round_block(levels, slope[:, start:], weight[start:stop], target, codes[start:stop], error[start:stop])
        clipped += _beyond_the_ends(levels, codes[start:stop], target).sum(0)
        added = factor.added[start:stop].to(weight.dtype)
        missed += _squares(target - levels.decode(codes[start:stop]), size.square())
        missed -= _squares(error[start:stop], added)
        energy += _squares(slope @ weight[:stop], size.square())
        energy -= _squares(weight[start:stop], added)
    return _Tile(codes, clipped, missed, energy)


def _round_block(levels: Levels, slope: Tensor, weight: Tensor, target: Tensor, codes: Tensor, error: Tensor) -> None:
    """Round the columns of one block, [n, rows] each; `target`, `codes` and `error` are filled.

    slope  [n, n]: of the errors of this block's columns
    target what each column is to be rounded from, as far as it follows from the blocks before
    """
    divisor = levels.divisor
    for k in range(len(weight)):
        level = _vector(levels, k)
        if k:
            target[k].addmv_(error[:k].T, slope[k, :k])
        x = target[k] if level.offset is None else target[k] - level.offset
        codes[k] = level.nearest(x / divisor[k])
        torch.sub(weight[k], level.decode(codes[k]), out=error[k])


def _squares(values: Tensor, weights: Tensor) -> Tensor:
    """[rows] float64: sum over columns of weighted squares; values [columns, rows]."""
    return (values.square() * weights[:, None]).sum(0, dtype=torch.float64)


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
