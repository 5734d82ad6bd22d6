"""Where a build's time goes: seconds, tokens and arithmetic of each phase, counted only while somebody asks for it.

Phases nest; each counts what its inner ones leave, so that the sum over phases is the whole.

>>> with profiling() as profile:
...     build()
>>> profile.rows()
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Phase:
    """Sums over all visits of one phase.

    seconds  of wall clock
    cpu      seconds of processor time, over all threads of this process
    tokens   that ran through it
    flops    floating point operations of its matrix products and factorizations, from their shapes
    numbers  weights that it treated
    """

    seconds: float = 0.0
    cpu: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    numbers: int = 0
    visits: int = 0


@dataclass
class Profile:
    """Phases by name, in the order in which they were entered first."""

    phases: dict[str, Phase] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)
    _since: tuple[float, float] = (0.0, 0.0)

    def _settle(self) -> None:
        """Give the time since the last change to the phase that is open."""
        now = time.perf_counter(), time.process_time()
        if self._open:
            phase = self.phases[self._open[-1]]
            phase.seconds += now[0] - self._since[0]
            phase.cpu += now[1] - self._since[1]
        self._since = now

    def enter(self, name: str) -> Phase:
        """Open a phase; the one that was open waits."""
        self._settle()
        self._open.append(name)
        phase = self.phases.setdefault(name, Phase())
        phase.visits += 1
        return phase

    def leave(self) -> None:
        """Close the phase that was opened last."""
        self._settle()
        self._open.pop()

    def rows(self) -> list[dict[str, Any]]:
        """One row a phase, rates by wall clock; None where a phase has no such figure."""
        whole = sum(phase.seconds for phase in self.phases.values()) or 1.0
        return [
            {
                "phase": name,
                "seconds": round(one.seconds, 2),
                "share": round(one.seconds / whole, 4),
                "cpu_seconds": round(one.cpu, 2),
                "tokens_per_second": _rate(one.tokens, one.seconds),
                "gflops": _rate(one.flops / 1e9, one.seconds),
                "million_weights_per_second": _rate(one.numbers / 1e6, one.seconds),
            }
            for name, one in self.phases.items()
        ]


def _rate(amount: float, seconds: float) -> float | None:
    return round(amount / seconds, 2) if amount and seconds > 0 else None


_CURRENT: ContextVar[Profile | None] = ContextVar("llmpack_profile", default=None)


@contextmanager
def profiling() -> Iterator[Profile]:
    """Count phases of this thread from here on."""
    profile = Profile()
    token = _CURRENT.set(profile)
    try:
        yield profile
    finally:
        _CURRENT.reset(token)


@contextmanager
def phase(name: str, *, tokens: int = 0, flops: float = 0.0, numbers: int = 0) -> Iterator[None]:
    """Count what happens inside under `name`; costs next to nothing while nobody profiles."""
    profile = _CURRENT.get()
    if profile is None:
        yield
        return
    one = profile.enter(name)
    one.tokens += tokens
    one.flops += flops
    one.numbers += numbers
    try:
        yield
    finally:
        profile.leave()


def uncount(name: str, flops: float) -> None:
    """Take back arithmetic that was announced for a phase and then not done."""
    profile = _CURRENT.get()
    if profile is not None:
        profile.phases[name].flops -= flops
