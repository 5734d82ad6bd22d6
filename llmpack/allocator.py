"""The allocator of the C library, asked to give freed memory back."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Numbers of glibc's malloc.h."""

LARGE = 32 << 20
"""Bytes from which on a piece is mapped by itself: the most that glibc takes there by its own choice."""


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


def keep_freed_memory() -> None:
    """Let the heap keep what is freed until `give_back_memory`, from now on (glibc only).

    glibc would return the top of the heap whenever some MiB of it are free, and the kernel would clear the same pages
    again for the next activations: half the time of elementwise operations on them.
    """
    library = _library()
    if library is not None:
        library.mallopt(M_MMAP_THRESHOLD, LARGE)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
