"""How long is measured. A module of its own, so that asking costs no runtime."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """How long is measured.

    repetitions    at least so many in a round
    least_seconds  and at least so many seconds, so that short runs are repeated more often
    most_seconds   no repetition beyond `repetitions` and no further round begins after so many
    rounds         how often a noisy measurement is tried
    """

    repetitions: int = 5
    least_seconds: float = 20.0
    most_seconds: float = 300.0
    rounds: int = 3


STANDARD = Protocol()
MEMORY_ALONE = Protocol(repetitions=1, least_seconds=0.0, rounds=1)
"""Enough where nothing is asked of time: the warm-up and one repetition fill the cache and touch everything."""
