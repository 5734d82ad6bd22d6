"""Functions that numba compiles, for loops over single numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from llmpack.lazy import LazyModule

numba: Any = LazyModule("numba")  # where it is missing, the error names the extra that brings it

LANES = 64
"""Columns (groups, rows) that a loop takes at a time, into buffers that the innermost cache holds. A processor computes
one of them in each lane of its registers."""

Array = np.ndarray[Any, Any]


def compiled(function: Callable[..., Any]) -> Any:
    """The function as machine code, made at its first call and kept on disk where numba finds a folder for it.

    It runs beside other threads, and division by zero gives what IEEE says. No operation is fused or reordered. What is
    kept is made anew when the file of the function changes, not when that of one it calls does.
    """
    try:
        return numba.njit(function, nogil=True, cache=True, error_model="numpy")
    except RuntimeError:  # neither the package's folder nor the user's can be written
        return numba.njit(function, nogil=True, error_model="numpy")


@compiled
def take_lanes(source: Array, start: int, lanes: Array) -> None:
    """Copy `LANES` numbers of a vector from `start` on; what is missing at the end is 0."""
    width = min(LANES, len(source) - start)
    for k in range(width):
        lanes[k] = source[start + k]
    for k in range(width, LANES):
        lanes[k] = 0


@compiled
def put_lanes(lanes: Array, start: int, target: Array) -> None:
    """Inverse of `take_lanes`."""
    for k in range(min(LANES, len(target) - start)):
        target[start + k] = lanes[k]
