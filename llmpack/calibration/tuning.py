"""A rounded block adjusted to put out what the unchanged model has there.

Input is what the rounded blocks before give, the aim is the reference stream of the walk after the same block: so
each block also makes up for what it can of the errors before it. One sequence in `HELD_EVERY` is kept out of the
descent, and decides whether the block stays as tuned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from llmpack.algorithms.drift import HELD_EVERY
from llmpack.algorithms.tuning import MovableNorm, MovableScales, Tuning, output_error
from llmpack.calibration.walk import Visit
from llmpack.encodings.encoding import Quantized
from llmpack.encodings.grids import ScaleGrid
from llmpack.profile import phase
from llmpack.progress import QUIET, Progress

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Tuned:
    """What tuning did to a block.

    before, after  error of its output on the sequences kept out (see `output_error`); None where there were too few
    rounded        the matrices on their new grids, by name; none where the block stays as it was
    norms          float32, by name; none where the block stays as it was
    """

    before: float | None
    after: float | None
    rounded: Mapping[str, Quantized] = field(default_factory=dict)
    norms: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def kept(self) -> bool:
        """Whether the block is better for it on text that the descent has not seen."""
        return self.before is not None and self.after is not None and self.after < self.before


def tune(
    visit: Visit, rounded: Mapping[str, Quantized], *, steps: int, rate: float, progress: Progress = QUIET
) -> Tuned:
    """Adjust scales and norms of a block whose matrices were replaced by `rounded`; the block then runs as it stays.

    rounded  by name; matrices whose scales cannot move by a little (powers of two) stay, and so does what is missing
    steps    of gradient descent, one batch of the corpus each, in order, again from the first when all were seen

    With fewer than `HELD_EVERY` sequences nothing can decide, and nothing is done.
    """
    before = held_error(visit)
    if before is None:
        return Tuned(None, None)
    names = [spec.name for spec in visit.specs if spec.part == "norm"]
    start = {name: visit.weight(name) for name in names}
    scales = {
        name: MovableScales(visit.parameter(name), one)
        for name, one in rounded.items()
        if isinstance(one.grid, ScaleGrid) and one.grid.units
    }
    norms = {name: MovableNorm(visit.parameter(name)) for name in names}
    descent = Tuning([*scales.values(), *norms.values()], rate=rate, steps=steps)
    with phase("tune"), progress.task(f"block {visit.index}, tuning", steps) as done:
        for given, wanted in islice(_endless(visit), steps):
            descent.step(partial(_loss, visit, given, wanted))
            done(1)
    moved = {name: replace(rounded[name], grid=one.grid()) for name, one in scales.items()}
    found = Tuned(before, None, moved, {name: visit.parameter(name).detach().clone() for name in names})
    _put(visit, found.rounded, found.norms)
    found = replace(found, after=held_error(visit))
    if found.kept:
        return found
    _put(visit, {name: rounded[name] for name in moved}, start)
    return Tuned(before, found.after)


def held_error(visit: Visit) -> float | None:
    """Error of the block's output over the sequences kept out; None where there are none."""
    total, count = 0.0, 0
    for given, wanted in _sequences(visit, held=True):
        total += float(output_error(visit.run(given), wanted)) * len(given)
        count += len(given)
    return total / count if count else None


def _loss(visit: Visit, given: Tensor, wanted: Tensor) -> Tensor:
    return output_error(visit.run(given, learning=True), wanted)


def _put(visit: Visit, rounded: Mapping[str, Quantized], norms: Mapping[str, Tensor]) -> None:
    for name, one in rounded.items():
        visit.replace(name, one.decode())
    for name, values in norms.items():
        visit.replace(name, values)


def _endless(visit: Visit) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from _sequences(visit, held=False)


def _sequences(visit: Visit, *, held: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """What the block is given and what it should put out, of the sequences kept out or of all others."""
    for part, given, wanted in visit.pairs():
        chosen = [n - part.start for n in range(part.start, part.stop) if (n % HELD_EVERY == HELD_EVERY - 1) == held]
        if chosen:
            yield given[chosen], wanted[chosen]
