"""The system's cache of files: emptied of one file before a cold start, and looked at to be sure."""

from __future__ import annotations

import ctypes
import ctypes.util
import mmap
import os
import sys
from pathlib import Path

import numpy as np


def drop_from_cache(path: Path) -> float | None:
    """Ask the system to forget a file's pages; the share of it that is cached afterwards.

    None where the system offers no such thing: then nobody knows whether a start is cold.
    """
    if sys.platform != "linux":
        return None
    with path.open("rb") as file:
        os.fsync(file.fileno())  # pages that are not written yet are never dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_share(path)


def cached_share(path: Path) -> float:
    """Share of a file's pages that are in memory. Linux; source: mincore(2)."""
    size = path.stat().st_size
    if size == 0:
        return 0.0
    pages = -(-size // mmap.PAGESIZE)
    resident = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        failed = libc.mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), resident)
        del view  # a map that is exported cannot be closed
    if failed:
        code = ctypes.get_errno()
        raise OSError(code, f"mincore: {os.strerror(code)}", str(path))
    return float((np.asarray(resident, np.uint8) & 1).mean())
