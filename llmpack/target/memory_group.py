"""A memory cgroup for a measured process, below a folder that was delegated for it.

llmpack makes groups nowhere else than below the folder that ``LLMPACK_CGROUP`` names, for example the one of a systemd
unit with ``Delegate=yes``; without it, or where it cannot be used, other means hold the process (see
`target.enforcement`). Pages of mapped files count in a group and are reclaimed rather than refused, so a verdict always
compares the peak too.

Sources: Linux Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "LLMPACK_CGROUP"


@dataclass(frozen=True)
class Hierarchy:
    """A folder below which groups may be made.

    version  2, or 1 for the memory controller of old systems
    """

    folder: Path
    version: int

    @classmethod
    def find(cls, environment: Mapping[str, str] | None = None) -> Hierarchy | None:
        """The delegated folder, or None where there is none or it holds no memory controller."""
        named = (os.environ if environment is None else environment).get(VARIABLE)
        if not named:
            return None
        folder = Path(named)
        if "memory" in _words(folder / "cgroup.subtree_control"):
            return cls(folder, 2)
        if (folder / "memory.limit_in_bytes").is_file():
            return cls(folder, 1)
        return None

    @property
    def limits(self) -> tuple[str, str]:
        """Names of the files that take the limit of memory, and of memory and swap."""
        return {2: ("memory.max", "memory.swap.max"), 1: ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")}[
            self.version
        ]


@dataclass(frozen=True)
class MemoryGroup:
    """A group with a limit, and one process in it."""

    folder: Path
    version: int

    @property
    def peak(self) -> int | None:
        """Most bytes that the group ever held, where the kernel tells."""
        name = "memory.peak" if self.version == 2 else "memory.max_usage_in_bytes"
        words = _words(self.folder / name)
        return int(words[0]) if words and words[0].isdigit() else None

    @property
    def kills(self) -> int:
        """How many of its processes the kernel ended for want of memory."""
        words = _words(self.folder / ("memory.events" if self.version == 2 else "memory.oom_control"))
        pairs = dict(zip(words[::2], words[1::2], strict=False))
        return int(pairs.get("oom_kill", "0"))


@contextmanager
def memory_group(hierarchy: Hierarchy, pid: int, nbytes: int) -> Iterator[MemoryGroup]:
    """A new group with that limit and no swap, with the process in it; removed afterwards, when the process is gone.

    Raises OSError where the system does not let it be made.
    """
    folder = hierarchy.folder / f"llmpack-{pid}"
    folder.mkdir()
    try:
        memory, swap = hierarchy.limits
        (folder / memory).write_text(str(nbytes))
        with suppress(FileNotFoundError):  # a kernel without accounting of swap
            (folder / swap).write_text("0" if hierarchy.version == 2 else str(nbytes))
        (folder / "cgroup.procs").write_text(str(pid))
        yield MemoryGroup(folder, hierarchy.version)
    finally:
        with suppress(OSError):  # still busy if the process lives; then it stays, empty of limits for others
            folder.rmdir()


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
