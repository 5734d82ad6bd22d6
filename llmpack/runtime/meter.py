"""The meter of memory: what a process and its children hold, and the most that they held.

The peak is the kernel's own high-water mark of the resident set (VmHWM), which misses no spike and
is reset at exec. ``ru_maxrss`` is never used: after fork and exec it still holds the parent's peak.
The parts (anonymous memory, pages of files) have no such mark; `Watch` samples them.

Standard library only at import: the runtime's worker reads it too and must stay small.
Source: Linux Documentation/filesystems/proc.rst, ``/proc/PID/status``.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

_FIELDS = {"VmHWM": "peak", "VmRSS": "resident", "RssAnon": "anon", "RssFile": "file", "RssShmem": "shared"}
SAMPLE_SECONDS = 0.1
LIMITED_SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Memory:
    """Bytes of memory in use.

    peak      most that was ever resident (VmHWM); where the system keeps no mark, the most that was sampled
    resident  resident now
    anon      thereof anonymous: heap, KV cache, repacked weights
    file      thereof pages of mapped files: weights, libraries
    shared    thereof shared memory
    """

    peak: int
    resident: int
    anon: int = 0
    file: int = 0
    shared: int = 0

    def __add__(self, other: Memory) -> Memory:
        """Sums of every part. The sum of peaks is an upper bound of the peak of the sum."""
        return Memory(
            peak=self.peak + other.peak,
            resident=self.resident + other.resident,
            anon=self.anon + other.anon,
            file=self.file + other.file,
            shared=self.shared + other.shared,
        )

    def highest(self, other: Memory) -> Memory:
        """The larger of every part."""
        return Memory(
            peak=max(self.peak, other.peak),
            resident=max(self.resident, other.resident),
            anon=max(self.anon, other.anon),
            file=max(self.file, other.file),
            shared=max(self.shared, other.shared),
        )


def read_memory(pid: int | str = "self") -> Memory:
    """Memory of one process, "self" for this one. Raises ProcessLookupError when it is gone."""
    if sys.platform != "linux":
        return _portable_memory(None if pid == "self" else int(pid))
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"no process {pid}") from None
    found = {}
    for line in text.splitlines():
        key, _, rest = line.partition(":")
        if key in _FIELDS:
            found[_FIELDS[key]] = int(rest.split()[0]) * 1024
    if "resident" not in found:  # a zombie has given its memory back
        raise ProcessLookupError(f"process {pid} has ended")
    return Memory(**found)


def _portable_memory(pid: int | None) -> Memory:
    import psutil

    try:
        info = psutil.Process(pid).memory_info()
    except psutil.NoSuchProcess:
        raise ProcessLookupError(f"no process {pid}") from None
    peak = getattr(info, "peak_wset", info.rss)  # Windows keeps a mark, macOS does not
    return Memory(peak=peak, resident=info.rss)


def _descendants(pid: int) -> list[int]:
    """Children of children included. Read from /proc, ten times a second is then cheap enough not to disturb."""
    if sys.platform != "linux":
        import psutil

        try:
            return [child.pid for child in psutil.Process(pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
    found: list[int] = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in listing.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue  # that thread has ended
        for child in children:
            found += [child, *_descendants(child)]
    return found


def tree_memory(pid: int) -> Memory:
    """Memory of a process and all its descendants. Raises ProcessLookupError when it is gone."""
    total = read_memory(pid)
    for child in _descendants(pid):
        try:
            total += read_memory(child)
        except ProcessLookupError:
            continue  # it ended between the listing and the reading
    return total


class Watch:
    """Samples the memory of a process tree ten times a second, from outside, and keeps the highest of every part.

    With a limit it looks fifty times a second, and calls `exceeded` once if more was ever resident; `broken` then says
    so. The kernel's mark is read too, so that a peak between two looks is seen by the next one.

    >>> with Watch(child.pid) as watch:
    ...     work()
    >>> watch.highest.anon
    """

    def __init__(self, pid: int, *, limit: int | None = None, exceeded: Callable[[], None] = lambda: None) -> None:
        self._pid = pid
        self._limit = limit
        self._exceeded = exceeded
        self._pause = SAMPLE_SECONDS if limit is None else LIMITED_SAMPLE_SECONDS
        self.broken = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.highest = tree_memory(pid)

    def sample(self) -> Memory:
        """Read now, and count it in."""
        seen = tree_memory(self._pid)
        seen = replace(seen, peak=max(seen.peak, seen.resident))
        self.highest = self.highest.highest(seen)
        if self._limit is not None and seen.peak > self._limit and not self.broken:
            self.broken = True
            self._exceeded()
        return seen

    def _run(self) -> None:
        while not self._stop.wait(self._pause):
            try:
                self.sample()
            except ProcessLookupError:
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
