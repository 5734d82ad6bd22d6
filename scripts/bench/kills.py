"""A build killed at random instants and started again: is it the same file, and how much was done twice?

An instant is a place in the blocks of the quantization: 7.4 is when 0.4 of the time that a block takes have passed
since block 7 began, or the block behind it where that is done already. SIGKILL goes to the whole process group.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import metered

from llmpack.cli.show import columns
from llmpack.units import format_seconds

_BLOCK = re.compile(r"block (\d+)\b")


class Telling:
    """In the child: progress that tells the parent of every block that is begun."""

    @contextmanager
    def task(self, title: str, total: float) -> Iterator[Callable[[float], None]]:
        """Tell of it, if it is a pass over a block."""
        if found := _BLOCK.match(title):
            metered.tell({"block": int(found[1])})
        yield lambda done: None

    def say(self, message: str) -> None:
        """One line on stderr."""
        print(f"llmpack: {message}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Attempt:
    """One start of the build.

    aim      the instant at which it was to be killed, None for never
    blocks   those that it began, in order, and the second when
    seconds  that it lived
    killed   whether it was; else it came to its end first
    told     everything else that it told
    """

    aim: float | None
    blocks: dict[int, float]
    seconds: float
    killed: bool
    told: dict[str, Any]

    @property
    def block_seconds(self) -> float:
        """What a block took; infinite where no two were begun."""
        begun = [*self.blocks.values()]
        return (begun[-1] - begun[0]) / (len(begun) - 1) if len(begun) > 1 else math.inf


def instants(count: int, blocks: int, seed: int) -> list[float]:
    """Where to kill, drawn evenly over all blocks; ascending, since a build that goes on does not come back."""
    draw = random.Random(seed)
    return sorted(draw.uniform(0, blocks) for _ in range(count))


def attempt(command: list[str], aim: float | None, block_seconds: float) -> Attempt:
    """Start the build, and kill it at its instant."""
    start, timer = time.perf_counter(), None
    blocks: dict[int, float] = {}
    told: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as child:
        try:
            for line in child.stdout or ():
                event = json.loads(line[1:]) if line.startswith("@") else {}
                told |= event
                if "block" in event:
                    blocks.setdefault(event["block"], time.perf_counter() - start)
                if aim is not None and timer is None and event.get("block", -1) >= int(aim):
                    timer = threading.Timer(aim % 1 * block_seconds, _kill, (child.pid,))
                    timer.start()
        except BaseException:
            _kill(child.pid)
            raise
        finally:
            if timer is not None:
                timer.cancel()
    if child.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}")
    killed = child.returncode != 0
    return Attempt(aim, blocks, time.perf_counter() - start, killed, told)


def _kill(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def repeated(attempts: list[Attempt]) -> list[int]:
    """How many blocks each attempt began that one before it had begun already."""
    counts, before = [], set[int]()
    for one in attempts:
        counts.append(len(before & one.blocks.keys()))
        before |= {*one.blocks}
    return counts


def report(attempts: list[Attempt], uninterrupted: float) -> None:
    """A table of all attempts, and what the kills cost."""
    rows = [["attempt", "killed at block", "after", "began with block", "blocks done twice"]]
    for number, (one, twice) in enumerate(zip(attempts, repeated(attempts), strict=True), 1):
        end = f"{one.aim:.2f}" if one.killed else "not"
        first = str(next(iter(one.blocks), "none"))
        rows.append([str(number), end, format_seconds(one.seconds), first, str(twice)])
    print("\n".join(columns(rows)))
    spent = sum(one.seconds for one in attempts)
    print(f"in all {format_seconds(spent)}, uninterrupted {format_seconds(uninterrupted)}")
