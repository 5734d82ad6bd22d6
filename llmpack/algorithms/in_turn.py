"""Columns rounded one after the other, each from what the errors of those before it have made of it (numba)."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmpack.compiled import LANES, compiled

Array = np.ndarray[Any, Any]

WHOLE32, WHOLE64 = float(3 << 22), float(3 << 51)
"""Added and taken away again in float32 or float64, they leave a small number rounded to a whole one, half to even."""


@compiled
def _lanes(source: Array, start: int, target: Array) -> None:
    """Copy some rows of a column; what is missing at the end is 0."""
    width = min(LANES, len(source) - start)
    for i in range(width):
        target[i] = source[start + i]
    for i in range(width, LANES):
        target[i] = 0


@compiled
def _ends(source: Array, k: int, start: int, target: Array) -> None:
    """The same of an array of one number for all."""
    if source.size == 1:
        for i in range(LANES):
            target[i] = source[0, 0]
    else:
        _lanes(source[k], start, target)


@compiled
def _put(source: Array, start: int, target: Array) -> None:
    for i in range(min(LANES, len(target) - start)):
        target[start + i] = source[i]


@compiled
def _shift(slope: Array, error: Array, count: int, target: Array) -> None:
    """Add ``slope[j] * error[j]`` of the first `count` columns, four at a time."""
    j = 0
    while j + 4 <= count:
        a, b, c, d = slope[j], slope[j + 1], slope[j + 2], slope[j + 3]
        for i in range(LANES):
            target[i] += (error[j, i] * a + error[j + 1, i] * b) + (error[j + 2, i] * c + error[j + 3, i] * d)
        j += 4
    for last in range(j, count):
        for i in range(LANES):
            target[i] += error[last, i] * slope[last]


@compiled
def _nearest(ratio: Array, low: Array, high: Array, middles: Array, table: Array) -> None:
    """Replace ratios by multiples: whole ones, or the entries of a table if there is one."""
    if len(table) == 0:
        whole = ratio.dtype.type(WHOLE32 if ratio.itemsize == 4 else WHOLE64)
        for i in range(LANES):
            value = ratio[i]
            value = low[i] if value < low[i] else value
            value = high[i] if value > high[i] else value
            ratio[i] = (value + whole) - whole
        return
    for i in range(LANES):
        at = 0
        for j in range(len(middles)):
            at += ratio[i] > middles[j]
        ratio[i] = table[at]


@compiled
def round_in_turn(
    slope: Array,
    target: Array,
    weight: Array,
    scale: Array,
    offset: Array,
    low: Array,
    high: Array,
    middles: Array,
    table: Array,
    error: Array,
    multiples: Array,
) -> None:
    """Round all rows of n columns; arrays are [n, rows] of one float type where nothing else is said.

    slope      [n, n]: what a unit of error in column j adds to column k, at [k, j] with j < k
    target     what each column is to be rounded from, as far as columns before these say; the rest is added
    weight     what errors are taken from
    scale      0 where every value is the offset
    offset     or [1, 1]
    low, high  the outermost multiples, or [1, 1]
    table      [codes], ascending, with middles [codes - 1]; both empty where multiples are whole numbers
    error      filled: weight less its rounded value
    multiples  filled
    """
    n = len(slope)
    kind = target.dtype
    errors = np.empty((n, LANES), kind)
    now, own, ratio, scales = np.empty(LANES, kind), np.empty(LANES, kind), np.empty(LANES, kind), np.empty(LANES, kind)
    shift, lows, highs = np.empty(LANES, kind), np.empty(LANES, kind), np.empty(LANES, kind)
    for first in range(0, target.shape[1], LANES):
        for k in range(n):
            _lanes(target[k], first, now)
            _lanes(weight[k], first, own)
            _lanes(scale[k], first, scales)
            _ends(offset, k, first, shift)
            _ends(low, k, first, lows)
            _ends(high, k, first, highs)
            _shift(slope[k], errors, k, now)
            for i in range(LANES):
                found = (now[i] - shift[i]) / scales[i]
                ratio[i] = found if scales[i] != 0 else 0
            _nearest(ratio, lows, highs, middles, table)
            for i in range(LANES):
                errors[k, i] = own[i] - (ratio[i] * scales[i] + shift[i])
            _put(now, first, target[k])
            _put(errors[k], first, error[k])
            _put(ratio, first, multiples[k])
