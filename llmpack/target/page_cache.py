"""The system's cache of files: emptied of one file before a cold start, and looked at to be sure.

And what it hides: how fast the disk reads.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import mmap
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

READ_BYTES, PIECE_BYTES = 64 << 20, 4 << 20
UNCACHED_SHARE = 0.01


def measure_storage(folder: Path) -> int | None:
    """Bytes per second that a file in that folder is read with, in order and not from the cache; best of three.

    None where a file cannot be written, or cannot be put out of the cache (a file system in memory; not Linux).
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".llmpack-") as file:
            piece = os.urandom(PIECE_BYTES)
            for _ in range(READ_BYTES // PIECE_BYTES):
                file.write(piece)
            file.flush()
            seconds = [_uncached_read(Path(file.name)) for _ in range(3)]
    except OSError:
        return None
    known = [one for one in seconds if one is not None]
    return int(READ_BYTES / min(known)) if known else None


def _uncached_read(path: Path) -> float | None:
    """Seconds that reading a file takes; None if it is cached and stays so."""
    cached = drop_from_cache(path)
    if cached is None or cached > UNCACHED_SHARE:
        return None
    buffer = bytearray(PIECE_BYTES)
    with path.open("rb", buffering=0) as file:
        started = time.perf_counter()
        while file.readinto(buffer):
            pass
        return time.perf_counter() - started


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
