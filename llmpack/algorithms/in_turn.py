"""Columns rounded one after the other, each from what the errors of those before it have made of it (numba)."""

from __future__ import annotations

import numpy as np

from llmpack.compiled import LANES, Array, compiled, put_lanes, take_lanes

WHOLE32, WHOLE64 = float(3 << 22), float(3 << 51)
"""Added and taken away again in float32 or float64, they leave a small number rounded to a whole one, half to even."""


@compiled
def _column(source: Array, k: int, start: int, target: Array) -> None:
    """`take_lanes` of column k, or the one number that there is."""
    if source.size == 1:
        for i in range(LANES):
            target[i] = source[0, 0]
    else:
        take_lanes(source[k], start, target)


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
            take_lanes(target[k], first, now)
            take_lanes(weight[k], first, own)
            take_lanes(scale[k], first, scales)
            _column(offset, k, first, shift)
            _column(low, k, first, lows)
            _column(high, k, first, highs)
            _shift(slope[k], errors, k, now)
            for i in range(LANES):
                found = (now[i] - shift[i]) / scales[i]
                ratio[i] = found if scales[i] != 0 else 0
            _nearest(ratio, lows, highs, middles, table)
            for i in range(LANES):
                errors[k, i] = own[i] - (ratio[i] * scales[i] + shift[i])
            put_lanes(now, first, target[k])
            put_lanes(errors[k], first, error[k])
            put_lanes(ratio, first, multiples[k])
