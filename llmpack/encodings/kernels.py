"""Loops over groups of numbers, compiled by numba: rounding, the sums of a least-squares fit, searches of many fits.

Arrays are float32 and upright: [group, n] with one column per group, or [n]. Groups are taken `LANES` at a time into
buffers that the innermost cache holds, so that a processor computes one group in each lane of its registers. Sums over
a group add halves to halves and no operation is fused or reordered: what is found for a group depends on nothing but
its numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmpack.compiled import LANES, compiled, put_lanes, take_lanes

Floats: TypeAlias = NDArray[np.float32]

WHOLE = np.float32(3 << 22)
"""Added and taken away again, it leaves a number of less than 2^22 rounded to a whole one, half to even."""

f32 = np.float32


class Rounding(NamedTuple):
    """How numbers of groups are rounded: to the multiple nearest to ``(x - offset) * inverse``.

    offset, inverse  [n]
    low, high        [n]: the outermost multiples, which are whole numbers where there is no table
    first, table     multiples by doubled ratio, rounded up, from `first` on (see `steps.Lookup`); empty where whole
    """

    offset: Floats
    inverse: Floats
    low: Floats
    high: Floats
    first: int
    table: Floats


@compiled
def _empty(group: int) -> Any:
    # by itself: as part of a larger array it is not known to lie in one piece, and loops go number by number
    return np.empty((group, LANES), f32)


@compiled
def _lane() -> Any:
    return np.empty(LANES, f32)


@compiled
def _strip(source: Floats, start: int, target: Floats) -> None:
    """Copy a strip of groups; what is missing at the end is 0."""
    width = min(LANES, source.shape[1] - start)
    for i in range(source.shape[0]):
        for k in range(width):
            target[i, k] = source[i, start + k]
        for k in range(width, LANES):
            target[i, k] = f32(0)


@compiled
def _part(rounding: Rounding) -> Any:
    """A rounding for one strip, its numbers still to be filled in."""
    return Rounding(_lane(), _lane(), _lane(), _lane(), rounding.first, rounding.table)


@compiled
def _lanes_of(rounding: Rounding, start: int, part: Rounding) -> None:
    take_lanes(rounding.offset, start, part.offset)
    take_lanes(rounding.inverse, start, part.inverse)
    take_lanes(rounding.low, start, part.low)
    take_lanes(rounding.high, start, part.high)


@compiled
def _quotient(a: Any, b: Any) -> Any:
    """a / b, and 0 where that is not finite."""
    found = a / b
    return found if abs(found) < f32(np.inf) else f32(0)


@compiled
def _round(x: Floats, rounding: Rounding, q: Floats) -> None:
    """Fill q with the multiples that a strip is rounded to."""
    offset, inverse, low, high, first, table = rounding
    if len(table) == 0:
        for i in range(x.shape[0]):
            for k in range(LANES):
                ratio = (x[i, k] - offset[k]) * inverse[k]
                ratio = low[k] if ratio < low[k] else ratio
                ratio = high[k] if ratio > high[k] else ratio
                q[i, k] = (ratio + WHOLE) - WHOLE
        return
    least, most = f32(first), f32(first + len(table) - 1)
    for i in range(x.shape[0]):
        for k in range(LANES):
            doubled = np.ceil((x[i, k] - offset[k]) * inverse[k] * f32(2))
            doubled = least if doubled < least else doubled
            doubled = most if doubled > most else doubled
            q[i, k] = table[int(doubled - least)]


@compiled
def _fold(terms: Floats, out: Floats) -> None:
    """Sum over a group; `terms` is overwritten."""
    count = terms.shape[0]
    while count > 1:
        half = (count + 1) // 2
        for i in range(count - half):
            for k in range(LANES):
                terms[i, k] += terms[half + i, k]
        count = half
    for k in range(LANES):
        out[k] = terms[0, k]


@compiled
def _sum(a: Floats, q: Floats, terms: Floats, out: Floats) -> None:
    """``sum a q``."""
    for i in range(a.shape[0]):
        for k in range(LANES):
            terms[i, k] = a[i, k] * q[i, k]
    _fold(terms, out)


@compiled
def _square(w: Floats, q: Floats, terms: Floats, out: Floats) -> None:
    """``sum w q^2``."""
    for i in range(w.shape[0]):
        for k in range(LANES):
            terms[i, k] = w[i, k] * q[i, k] * q[i, k]
    _fold(terms, out)


@compiled
def _line(linear: Any, square: Any, across: Any, mean: Any, weight: Any, below_zero: bool) -> Any:
    """Scale, offset and gain of the least-squares line, from sums over multiples; `across` of numbers less their mean.

    Numbers are taken from their mean for precision. Gain is by how much the error is less than that of the mean.
    """
    middle = _quotient(linear, weight)
    spread = square - linear * middle
    scale = _quotient(across, spread)
    scale = scale if spread > f32(1e-6) * square else f32(0)
    offset = mean - scale * middle
    gain = scale * across
    through = across + mean * linear
    steep = _quotient(through, square)
    # where offsets are at most 0, the best line that would be above goes through 0
    above = below_zero and offset > f32(0)
    gain = steep * through - mean * mean * weight if above else gain
    return steep if above else scale, f32(0) if above else offset, gain


@compiled
def multiples(x: Floats, rounding: Rounding, q: Floats) -> None:
    """Fill q [group, n] with the multiples that x is rounded to."""
    group, n = x.shape
    some, found, part = _empty(group), _empty(group), _part(rounding)
    for start in range(0, n, LANES):
        _strip(x, start, some)
        _lanes_of(rounding, start, part)
        _round(some, part, found)
        for i in range(group):
            for k in range(min(LANES, n - start)):
                q[i, start + k] = found[i, k]


@compiled
def errors(x: Floats, w: Floats, scales: Floats, offsets: Floats, rounding: Rounding, out: Floats) -> None:
    """Fill out [tries, n] with ``sum w (scale * q + offset - x)^2``, q being nearest to ``(x - offset) / scale``.

    scales, offsets  [tries, n], in place of those of `rounding`
    """
    group, n = x.shape
    some, weights, q, part = _empty(group), _empty(group), _empty(group), _part(rounding)
    scale, offset, inverse, total = _lane(), part.offset, part.inverse, _lane()
    for start in range(0, n, LANES):
        _strip(x, start, some)
        _strip(w, start, weights)
        _lanes_of(rounding, start, part)
        for tried in range(len(scales)):
            take_lanes(scales[tried], start, scale)
            take_lanes(offsets[tried], start, offset)
            for k in range(LANES):
                inverse[k] = _quotient(f32(1), scale[k])
            _round(some, part, q)
            for i in range(group):
                for k in range(LANES):
                    missed = q[i, k] * scale[k] + offset[k] - some[i, k]
                    q[i, k] = missed * missed * weights[i, k]
            _fold(q, total)
            put_lanes(total, start, out[tried])


@compiled
def sums(x: Floats, w: Floats, a: Floats, rounding: Rounding, out: Floats) -> None:
    """Fill out [3, n] with ``sum w q``, ``sum w q^2`` and ``sum a q`` of the multiples q that x is rounded to."""
    group, n = x.shape
    some, weights, other, q, terms = _empty(group), _empty(group), _empty(group), _empty(group), _empty(group)
    part, total = _part(rounding), _lane()
    for start in range(0, n, LANES):
        _strip(x, start, some)
        _strip(w, start, weights)
        _strip(a, start, other)
        _lanes_of(rounding, start, part)
        _round(some, part, q)
        _sum(weights, q, terms, total)
        put_lanes(total, start, out[0])
        _square(weights, q, terms, total)
        put_lanes(total, start, out[1])
        _sum(other, q, terms, total)
        put_lanes(total, start, out[2])


@compiled
def best_scales(
    x: Floats, w: Floats, wx: Floats, extreme: Floats, shares: Floats, rounding: Rounding, out: Floats
) -> None:
    """Fill out [n] with the best of the least-squares scales of the roundings by ``extreme * shares``."""
    group, n = x.shape
    some, weights, products, q, terms = _empty(group), _empty(group), _empty(group), _empty(group), _empty(group)
    part, ends, across, square, scale, gain = _part(rounding), _lane(), _lane(), _lane(), _lane(), _lane()
    inverse = part.inverse
    for start in range(0, n, LANES):
        _strip(x, start, some)
        _strip(w, start, weights)
        _strip(wx, start, products)
        take_lanes(extreme, start, ends)
        _lanes_of(rounding, start, part)
        scale[:] = f32(0)
        gain[:] = f32(0)
        for share in shares:
            for k in range(LANES):
                inverse[k] = _quotient(f32(1), ends[k] * share)
            _round(some, part, q)
            _sum(products, q, terms, across)
            _square(weights, q, terms, square)
            for k in range(LANES):
                found = _quotient(across[k], square[k])
                gained = found * across[k]  # from the error of zeros
                better = gained > gain[k]
                scale[k] = found if better else scale[k]
                gain[k] = gained if better else gain[k]
        put_lanes(scale, start, out)


@compiled
def best_lines(
    x: Floats,
    w: Floats,
    centred: Floats,
    mean: Floats,
    weight: Floats,
    least: Floats,
    span: Floats,
    below: Floats,
    codes: Floats,
    rounding: Rounding,
    below_zero: bool,
    line: Floats,
) -> None:
    """Replace line [3, n], of scales, offsets and gains, by the best of the least-squares lines that gain more.

    Tried are roundings by steps of ``span / codes`` that begin `below` steps under the least number.
    """
    group, n = x.shape
    some, weights, products, q, terms = _empty(group), _empty(group), _empty(group), _empty(group), _empty(group)
    part, means, totals, starts, spans = _part(rounding), _lane(), _lane(), _lane(), _lane()
    linear, square, across, scale, base, gain = _lane(), _lane(), _lane(), _lane(), _lane(), _lane()
    offset, inverse = part.offset, part.inverse
    for start in range(0, n, LANES):
        _strip(x, start, some)
        _strip(w, start, weights)
        _strip(centred, start, products)
        take_lanes(mean, start, means)
        take_lanes(weight, start, totals)
        take_lanes(least, start, starts)
        take_lanes(span, start, spans)
        _lanes_of(rounding, start, part)
        take_lanes(line[0], start, scale)
        take_lanes(line[1], start, base)
        take_lanes(line[2], start, gain)
        for tried in range(len(codes)):
            for k in range(LANES):
                step = spans[k] / codes[tried]
                offset[k] = starts[k] - step * below[tried]
                inverse[k] = _quotient(f32(1), step)
            _round(some, part, q)
            _sum(weights, q, terms, linear)
            _square(weights, q, terms, square)
            _sum(products, q, terms, across)
            for k in range(LANES):
                steep, through, gained = _line(linear[k], square[k], across[k], means[k], totals[k], below_zero)
                better = gained > gain[k]
                scale[k] = steep if better else scale[k]
                base[k] = through if better else base[k]
                gain[k] = gained if better else gain[k]
        put_lanes(scale, start, line[0])
        put_lanes(base, start, line[1])
        put_lanes(gain, start, line[2])


@compiled
def lines(three: Floats, mean: Floats, weight: Floats, below_zero: bool, out: Floats) -> None:
    """Fill out [2, n] with scales and offsets of the least-squares lines, from what `sums` gives."""
    for k in range(len(mean)):
        out[0, k], out[1, k], _ = _line(three[0, k], three[1, k], three[2, k], mean[k], weight[k], below_zero)
