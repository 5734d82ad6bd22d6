"""Progress for people: a bar with the time left on a terminal, a few plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmpack.progress import Progress
from llmpack.units import format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

QUIET_SECONDS = 1.0


class Lines:
    """Progress on a stream that is no terminal: one line for each task that took longer than a second."""

    @contextmanager
    def task(self, title: str, total: float) -> Iterator[Callable[[float], None]]:
        """Say the title when it is done, with the time it took."""
        start = time.monotonic()
        yield lambda done: None
        spent = time.monotonic() - start
        if spent >= QUIET_SECONDS:
            self.say(f"{title}: {format_seconds(spent)}")

    def say(self, message: str) -> None:
        """One line on stderr."""
        print(f"llmpack: {message}", file=sys.stderr, flush=True)


class Bar:
    """Progress on a terminal. Bars exist only while a task runs, so that nothing is drawn into other output."""

    def __init__(self) -> None:
        self._bars: Bars | None = None
        self._open = 0

    @contextmanager
    def task(self, title: str, total: float) -> Iterator[Callable[[float], None]]:
        """A bar with percentage, time spent and time left."""
        bars = self._bars or _new_bars()
        if self._open == 0:
            bars.start()
        self._bars, self._open = bars, self._open + 1
        task = bars.add_task(title, total=total)
        try:
            yield lambda done: bars.advance(task, done)
        finally:
            bars.remove_task(task)
            self._open -= 1
            if self._open == 0:
                bars.stop()
                self._bars = None

    def say(self, message: str) -> None:
        """One line on stderr, above the bars."""
        if self._bars is None:
            print(f"llmpack: {message}", file=sys.stderr, flush=True)
        else:
            self._bars.console.print(f"llmpack: {message}", markup=False, highlight=False)


def _new_bars() -> Bars:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)


def progress() -> Progress:
    """A bar if stderr is a terminal that can draw one, lines otherwise."""
    import os

    plain = not sys.stderr.isatty() or os.environ.get("TERM") == "dumb" or os.environ.get("CI")
    return Lines() if plain else Bar()
