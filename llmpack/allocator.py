"""The allocator of the C library, asked to give freed memory back."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

M_ARENA_MAX = -8
"""The number of glibc's malloc.h."""


@cache
def _library() -> Any:
    """glibc, or None where the C library is another one."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None


def give_back_memory() -> None:
    """Return freed pages of the heap to the system, so that resident memory is what is in use (glibc only).

    glibc keeps freed pieces of up to 32 MiB for reuse; without this, each phase of a block would leave its own behind.
    """
    library = _library()
    if library is not None:
        library.malloc_trim(0)


def share_heap() -> None:
    """Let threads that start from now on use the heap of the main thread (glibc only).

    In heaps of their own, freed memory at the end would be out of reach of `give_back_memory`.
    """
    library = _library()
    if library is not None:
        library.mallopt(M_ARENA_MAX, 1)
