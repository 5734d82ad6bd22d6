"""A part of a benchmark in a process of its own: time, processor time, memory of the process tree and bytes read."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmpack.runtime.meter import Watch, read_memory, tree_memory


def _read_bytes() -> int:
    """Bytes that this process has fetched from the disk (not from the system's cache of files)."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise OSError("/proc/self/io has no read_bytes")


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


@contextmanager
def phase(name: str, **more: Any) -> Iterator[None]:
    """In the child: measure what happens inside, and tell the parent. The kernel's mark of the peak starts anew."""
    Path("/proc/self/clear_refs").write_text("5")
    start, cpu, read = time.perf_counter(), _cpu(), _read_bytes()
    yield
    tell(
        {
            "phase": name,
            "seconds": time.perf_counter() - start,
            "cpu": _cpu() - cpu,
            "peak": read_memory().peak,
            "read": _read_bytes() - read,
            **more,
        }
    )


def tell(event: dict[str, Any]) -> None:
    """In the child: one line for the parent."""
    print("@" + json.dumps(event), flush=True)


def run(
    script: Path,
    *arguments: str,
    python: Path | str = sys.executable,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> list[dict[str, Any]]:
    """In the parent: run a part, and give what it told. Every phase gets `tree`: the most that was resident in all
    processes together, sampled from outside, and never less than the kernel's own mark of the child."""
    command = [str(python), str(script), *arguments]
    piped = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, cwd=cwd)
    with piped as child, Watch(child.pid) as watch:
        events = []
        for line in child.stdout or ():
            if not line.startswith("@"):
                print(line, end="", file=sys.stderr)
                continue
            event = json.loads(line[1:])
            if "phase" in event:
                event["tree"] = max(watch.highest.resident, event["peak"])
                watch.highest = tree_memory(child.pid)
            events.append(event)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}")
    return events
