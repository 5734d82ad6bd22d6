"""Which option each item gets so that the sum of costs is least and the sizes stay within a budget.

This is the multiple-choice knapsack problem, solved exactly. Lagrange's relaxation gives a price per byte, a lower
bound and, by taking the steps of all convex hulls in order of what they save per byte, a choice close to it. An
option whose reduced cost exceeds the gap between the two is in no better choice, which leaves few; those are
enumerated by dynamic programming over (size, cost), where a state that another one beats in both is dropped.

Pisinger 1995, "A minimal algorithm for the multiple-choice knapsack problem", European Journal of Operational
Research 83, 394-410.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
else:
    from llmpack.lazy import LazyModule

    np = LazyModule("numpy")


@dataclass(frozen=True)
class Item:
    """One thing to choose an option for: size and cost of each option."""

    sizes: tuple[int, ...]
    costs: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.costs):
            raise ValueError(
                f"{len(self.sizes)} sizes and {len(self.costs)} costs; an item has options, each with both"
            )
        if not np.isfinite(self.costs).all() or min(self.sizes) < 0:
            raise ValueError("costs are finite, sizes are not negative")


@dataclass(frozen=True)
class Step:
    """From one option of an item to the next larger one on its convex hull."""

    item: int
    option: int
    size: int
    saving: float

    @property
    def rate(self) -> float:
        """Cost saved per unit of size."""
        return self.saving / self.size


def allocate(items: Sequence[Item], budget: int) -> tuple[int, ...]:
    """The option of each item that makes the sum of costs least with sizes of at most `budget` in all.

    Exact, up to rounding of the sums. Raises ValueError where even the smallest options do not fit.
    """
    smallest = sum(min(item.sizes) for item in items)
    if smallest > budget:
        raise ValueError(f"the smallest choice takes {smallest}, the budget is {budget}")
    hulls = [_hull(item) for item in items]
    chosen, price = _along_the_hulls(items, hulls, budget)
    if price is None:
        return chosen
    return _Search(items, budget, price, chosen).run()


def frontier(items: Sequence[Item]) -> list[tuple[int, float]]:
    """(size, least cost) of choices from the smallest to the best one.

    Each is the optimum for its own size; between two of them lie others, which `allocate` finds.
    """
    hulls = [_hull(item) for item in items]
    size = sum(item.sizes[hull[0]] for item, hull in zip(items, hulls, strict=True))
    cost = sum(item.costs[hull[0]] for item, hull in zip(items, hulls, strict=True))
    points = [(size, cost)]
    for step in _steps(items, hulls):
        size, cost = size + step.size, cost - step.saving
        points.append((size, cost))
    return points


def _hull(item: Item) -> list[int]:
    """Options on the lower convex hull, from the smallest to the one of least cost."""
    order = sorted(range(len(item.sizes)), key=lambda c: (item.sizes[c], item.costs[c], c))
    hull: list[int] = []
    for c in order:
        if hull and item.costs[c] >= item.costs[hull[-1]]:
            continue  # no smaller and no better than the one before
        while len(hull) > 1 and _rate(item, hull[-2], hull[-1]) <= _rate(item, hull[-2], c):
            hull.pop()
        hull.append(c)
    return hull


def _rate(item: Item, small: int, large: int) -> float:
    return (item.costs[small] - item.costs[large]) / (item.sizes[large] - item.sizes[small])


def _steps(items: Sequence[Item], hulls: Sequence[Sequence[int]]) -> list[Step]:
    """All steps of all hulls, the one that saves most per byte first; those of one item stay in order."""
    steps = [
        Step(index, large, item.sizes[large] - item.sizes[small], item.costs[small] - item.costs[large])
        for index, (item, hull) in enumerate(zip(items, hulls, strict=True))
        for small, large in pairwise(hull)
    ]
    return sorted(steps, key=lambda step: -step.rate)


def _along_the_hulls(
    items: Sequence[Item], hulls: Sequence[Sequence[int]], budget: int
) -> tuple[tuple[int, ...], float | None]:
    """A good choice, and the price per byte at which the budget splits a step; None if every step fits."""
    chosen = [hull[0] for hull in hulls]
    used = sum(item.sizes[c] for item, c in zip(items, chosen, strict=True))
    price, stuck = None, set()
    for step in _steps(items, hulls):
        if step.item in stuck:
            continue
        if used + step.size > budget:
            price = step.rate if price is None else price
            stuck.add(step.item)
            continue
        used += step.size
        chosen[step.item] = step.option
    return tuple(chosen), price


class _Search:
    """Enumerates what may be better than a known choice.

    With the price ``m``, every choice costs ``D + sum of reduced costs + m * (bytes left over)``, where D is Lagrange's
    bound; so whatever is better has reduced costs below the gap of the best choice known.
    """

    def __init__(self, items: Sequence[Item], budget: int, price: float, known: tuple[int, ...]) -> None:
        self.items, self.budget, self.price, self.best = items, budget, price, known
        priced = [np.array(i.costs) + price * np.array(i.sizes, dtype=float) for i in items]
        self.base = [_cheapest(p, item.sizes) for p, item in zip(priced, items, strict=True)]
        self.reduced = [p - p.min() for p in priced]
        self.gap = self._gap(known)

    def _gap(self, chosen: Sequence[int]) -> float:
        size = sum(item.sizes[c] for item, c in zip(self.items, chosen, strict=True))
        reduced = sum(float(r[c]) for r, c in zip(self.reduced, chosen, strict=True))
        return reduced + self.price * (self.budget - size)

    def run(self) -> tuple[int, ...]:
        """The best choice."""
        # items that can change at the least cost first: the gap shrinks early
        live = [i for i, r in enumerate(self.reduced) if len(self._live(i)) > 1]
        live.sort(key=lambda i: (min(float(self.reduced[i][c]) for c in self._live(i) if c != self.base[i]), i))
        sizes = np.array([sum(item.sizes[c] for item, c in zip(self.items, self.base, strict=True))], dtype=np.int64)
        reduced = np.zeros(1)
        room = [self._room(i) for i in live]
        trail: list[tuple[int, np.ndarray, np.ndarray]] = []
        found: tuple[int, int] | None = None
        for at, i in enumerate(live):
            sizes, reduced, parent, option = self._extend(i, sizes, reduced)
            shrink, grow = sum(low for low, _ in room[at + 1 :]), sum(high for _, high in room[at + 1 :])
            keep = self._promising(sizes, reduced, shrink, grow)
            sizes, reduced = sizes[keep], reduced[keep]
            trail.append((i, parent[keep], option[keep]))
            whole = np.where(sizes <= self.budget, reduced + self.price * (self.budget - sizes), np.inf)
            if len(whole) and whole.min() < self.gap:
                self.gap, found = float(whole.min()), (at, int(whole.argmin()))
            if not len(sizes):
                break
        return self.best if found is None else self._trace(trail, *found)

    def _live(self, i: int) -> list[int]:
        """Options of an item that a better choice may have."""
        return [c for c in range(len(self.items[i].sizes)) if c == self.base[i] or self.reduced[i][c] < self.gap]

    def _room(self, i: int) -> tuple[int, int]:
        """How far an item can go below and above the size that it has at first."""
        changes = [self.items[i].sizes[c] - self.items[i].sizes[self.base[i]] for c in self._live(i)]
        return min(changes), max(changes)

    def _extend(
        self, i: int, sizes: np.ndarray, reduced: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        options, item, base = self._live(i), self.items[i], self.base[i]
        parent = np.tile(np.arange(len(sizes)), len(options))
        option = np.repeat(np.array(options), len(sizes))
        grown = np.concatenate([sizes + (item.sizes[c] - item.sizes[base]) for c in options])
        return grown, np.concatenate([reduced + self.reduced[i][c] for c in options]), parent, option

    def _promising(self, sizes: np.ndarray, reduced: np.ndarray, shrink: int, grow: int) -> np.ndarray:
        """Indices of states that can still lead to something better, and that no other one beats."""
        left = np.maximum(0, self.budget - sizes - grow)
        alive = np.flatnonzero((reduced + self.price * left < self.gap) & (sizes + shrink <= self.budget))
        cost = reduced[alive] - self.price * sizes[alive]
        order = alive[np.lexsort((cost, sizes[alive]))]
        ranked = reduced[order] - self.price * sizes[order]
        before = np.minimum.accumulate(np.concatenate([[np.inf], ranked[:-1]])) if len(ranked) else ranked
        return order[ranked < before]

    def _trace(self, trail: Sequence[tuple[int, np.ndarray, np.ndarray]], at: int, state: int) -> tuple[int, ...]:
        chosen = list(self.base)
        for i, parent, option in reversed(trail[: at + 1]):
            chosen[i] = int(option[state])
            state = int(parent[state])
        return tuple(chosen)


def _cheapest(priced: np.ndarray, sizes: Sequence[int]) -> int:
    """The option of least price, the smallest of equal ones."""
    return min(range(len(sizes)), key=lambda c: (float(priced[c]), sizes[c]))
