"""Functions that numba compiles, for loops over single numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

LANES = 64
"""Columns (groups, rows) that a loop takes at a time, into buffers that the innermost cache holds. A processor computes
one of them in each lane of its registers."""


def compiled(function: Callable[..., Any]) -> Any:
    """The function as machine code, made at its first call and kept on disk where numba finds a folder for it.

    It runs beside other threads, and division by zero gives what IEEE says. No operation is fused or reordered.
    """
    try:
        return numba.njit(function, nogil=True, cache=True, error_model="numpy")
    except RuntimeError:  # neither the package's folder nor the user's can be written
        return numba.njit(function, nogil=True, error_model="numpy")
