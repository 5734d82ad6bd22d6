"""What goes into an encoding, checked, and cut into tiles that a core's cache holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmpack.parallel import even

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from llmpack.encodings.encoding import Encoding
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

TILE = 1 << 18
"""Numbers per tile of a scale search: enough that the hundreds of operations on it cost more than being called."""

LEAST = 1 << 16
"""Numbers per tile under which another thread is not worth its while."""

SLAB = 1 << 22
"""Numbers per run of rows where whole rows are encoded or decoded."""


def matrix(W: Tensor, name: str) -> Tensor:
    """`W` as float32 [rows, columns], sharing memory where it can.

    Raises ValueError unless it has two dimensions and every number is finite.
    """
    if W.ndim != 2:
        raise ValueError(f"{name} stores matrices; a tensor of shape {list(W.shape)} has {W.ndim} dimensions")
    values = W.detach().to(torch.float32)
    for rows in runs(values.shape[0], values.shape[1], SLAB):
        some = values[rows]
        if some.numel() and not all(bool(torch.isfinite(end)) for end in torch.aminmax(some)):  # NaN is both ends
            finite = torch.isfinite(some)
            row, column = (int(i) for i in torch.nonzero(~finite)[0])
            raise ValueError(
                f"{int((~finite).sum())} numbers are infinite or NaN, the first in row {rows.start + row}, "
                f"column {column}: {name} cannot store them"
            )
    return values


def weights_of(importance: Tensor | None, columns: int) -> Tensor | None:
    """`importance` as float32 [columns] with largest entry 1, or None where all columns weigh the same.

    Raises ValueError for another length, negative, infinite or NaN entries.
    """
    if importance is None:
        return None
    if importance.shape != (columns,):
        raise ValueError(f"importance has shape {list(importance.shape)}; the matrix has {columns} columns")
    weights = importance.detach().to(torch.float64)
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise ValueError("importance has negative, infinite or NaN entries; it is a mean of squares")
    top = weights.max() if columns else weights.sum()
    return (weights / top).to(torch.float32) if top > 0 else None


def packed_matrix(packed: np.ndarray, encoding: Encoding, columns: int) -> np.ndarray:
    """`packed`, which must be uint8 [rows, row bytes]. Raises ValueError where it is not."""
    expected = encoding.row_bytes(columns)
    if packed.dtype != "uint8" or packed.ndim != 2 or packed.shape[1] != expected:
        raise ValueError(
            f"{columns} columns of {encoding.name} are rows of {expected} bytes; "
            f"got {packed.dtype} of shape {list(packed.shape)}"
        )
    return packed


def runs(rows: int, columns: int, numbers: int) -> Iterator[slice]:
    """Runs of whole rows of about so many numbers, at least one row each."""
    step = max(1, numbers // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def tiles(rows: int, columns: int) -> list[slice]:
    """Runs of whole rows for a scale search, enough for all threads if they are long enough."""
    columns = max(1, columns)
    return even(rows, max(1, TILE // columns), max(1, LEAST // columns))


def upright(W: Tensor, group: int) -> Tensor:
    """Rows [rows, columns] as [group, rows * columns / group]: one column per group, a copy.

    Reductions over the first dimension then run along contiguous memory.
    """
    return W.reshape(-1, group).T.contiguous()


def upright_weights(weights: Tensor | None, W: Tensor, group: int, block: int) -> Tensor:
    """Weights of columns, [columns] or None for ones, in the layout of ``upright(W, group)``.

    Each block of columns is scaled to a largest weight of 1, and no weight is less than a hundred-millionth: what no
    input ever reaches is still rounded to something near. A block whose weights are all zero gets ones.
    """
    rows, columns = W.shape
    if weights is None:
        return W.new_ones(1, 1).expand(group, rows * columns // group)
    some = weights.to(W.device).reshape(-1, block)
    top = some.amax(1, keepdim=True)
    some = torch.where(top > 0, some / top, torch.ones_like(some))
    return some.clamp_(min=1e-8).reshape(-1, group).T.repeat(1, rows)
