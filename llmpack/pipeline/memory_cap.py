"""`[build] memory`, kept: steps run under a limit on the memory of this process.

Only Linux counts what is allocated (RLIMIT_DATA: private writable memory). What a process has reserved and never
touched is counted too, so the limit is set on what comes on top of what is resident when a step begins. Pages of
mapped weights are not counted, since they are dropped tensor by tensor. Elsewhere a recipe that sets the limit is
refused, because it would mean nothing.
"""

from __future__ import annotations

import importlib
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmpack.allocator import give_back_memory
from llmpack.errors import EnvironmentProblem
from llmpack.runtime.meter import read_memory
from llmpack.units import format_size

_TORCH_WORDS = ("can't allocate memory", "not enough memory")
_LOADED_BEFORE = ("torch", "transformers")
"""A limit that is too low must stop a step with a message, not break the loading of a library."""


@contextmanager
def capped_memory(limit: int | None) -> Iterator[None]:
    """Hold the block to `limit` bytes of resident memory; None for no limit.

    Raises EnvironmentProblem where the block needs more, and where the system cannot count.
    """
    if limit is None:
        yield
        return
    if not sys.platform.startswith("linux"):
        raise EnvironmentProblem("[build] memory can be kept on Linux only; leave it out on this system")
    for name in _LOADED_BEFORE:
        importlib.import_module(name)
    give_back_memory()
    resident = read_memory().resident
    if resident >= limit:
        raise _too_little(limit, f"{format_size(resident)} are held before it begins")
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = _private() + limit - resident
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, hard))
    try:
        yield
    except MemoryError as error:
        raise _too_little(limit, str(error) or "memory ran out") from error
    except RuntimeError as error:
        if not any(words in str(error) for words in _TORCH_WORDS):
            raise
        raise _too_little(limit, str(error)) from error
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _private() -> int:
    """Bytes of private writable memory that this process has now: what RLIMIT_DATA counts (proc(5), VmData)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise EnvironmentProblem("/proc/self/status has no VmData, so [build] memory cannot be kept; leave it out")


def _too_little(limit: int, reason: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"a step needs more than [build] memory = {format_size(limit)} ({reason}); raise it, or lower "
        "calibration.length. Finished blocks are kept"
    )
