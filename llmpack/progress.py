"""How long work tells how far it is; the command line shows it, a library call stays quiet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Receives the advance of named tasks."""

    def task(self, title: str, total: float) -> AbstractContextManager[Callable[[float], None]]:
        """Open a task of `total` units; the callable is told how many more are done."""

    def say(self, message: str) -> None:
        """One line for the user, such as a decision that was made."""


class Quiet:
    """Progress that nobody watches."""

    @contextmanager
    def task(self, title: str, total: float) -> Iterator[Callable[[float], None]]:
        """Counts nothing."""
        yield lambda done: None

    def say(self, message: str) -> None:
        """Says nothing."""


QUIET = Quiet()
