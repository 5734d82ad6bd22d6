"""Samples: repetitions of one timing, all of them kept, and what may be said about them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Samples:
    """Values of one quantity in the order in which they were taken."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values or not all(math.isfinite(v) for v in self.values):
            raise ValueError(f"samples are one or more finite numbers, not {self.values!r}")

    def quantile(self, share: float) -> float:
        """The value below which `share` of the samples lie, interpolated between neighbours."""
        ordered = sorted(self.values)
        place = share * (len(ordered) - 1)
        lower = math.floor(place)
        upper = min(lower + 1, len(ordered) - 1)
        return ordered[lower] + (place - lower) * (ordered[upper] - ordered[lower])

    @property
    def median(self) -> float:
        """Half of the samples are below."""
        return self.quantile(0.5)

    @property
    def p10(self) -> float:
        """A tenth of the samples is below."""
        return self.quantile(0.1)

    @property
    def p90(self) -> float:
        """A tenth of the samples is above."""
        return self.quantile(0.9)

    @property
    def cv(self) -> float:
        """Coefficient of variation: standard deviation over mean; 0 for a single sample."""
        if len(self.values) < 2:
            return 0.0
        return statistics.stdev(self.values) / statistics.fmean(self.values)

    def to_json(self) -> dict[str, Any]:
        """Every sample, and the summary that is shown."""
        return {
            "median": self.median,
            "p10": self.p10,
            "p90": self.p90,
            "min": min(self.values),
            "max": max(self.values),
            "cv": self.cv,
            "samples": list(self.values),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Samples:
        """The inverse of `to_json`; the summary is computed anew."""
        return cls(tuple(float(v) for v in values["samples"]))
