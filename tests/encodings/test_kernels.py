"""Compiled loops against plain numpy in float64."""

import numpy as np
import pytest

from llmpack.compiled import LANES, compiled
from llmpack.encodings import kernels
from llmpack.encodings.kernels import Rounding
from llmpack.encodings.legacy import IQ4_TABLE
from llmpack.encodings.steps import lookup

COUNTS = (1, LANES - 1, LANES, 2 * LANES + 5)
GROUPS = (1, 16, 20, 32)  # 20: halves that are not even


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rounding(n, low=-8, high=7, table=None, offset=0.0, scale=0.3):
    """How [*, n] is rounded, and the multiples there are."""
    values = np.arange(low, high + 1) if table is None else np.array(table)
    found = None if table is None else lookup(table)
    first, entries = (0, np.empty(0, np.float32)) if found is None else (found.first, found.values.numpy())
    whole = np.ones(n, np.float32)
    return Rounding(whole * offset, 1 / (whole * scale), whole * low, whole * high, first, entries), values


def nearest(x, values, offset, scale):
    """Multiples by search among all of them, float64."""
    ratio = (x.astype(np.float64) - offset) / scale
    return values[np.abs(ratio[..., None] - values).argmin(-1)].astype(np.float64)


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("table", [None, IQ4_TABLE], ids=["whole", "table"])
def test_multiples_errors_and_sums_are_those_of_plain_numpy(group, n, table):
    x, w, scale = drawn(group, n), np.abs(drawn(group, n, seed=1)), (0.02 if table else 0.3)
    how, values = rounding(n, table=table, offset=0.1, scale=scale)
    expected = nearest(x, values, np.float64(np.float32(0.1)), np.float64(np.float32(scale)))

    found = np.empty_like(x)
    kernels.multiples(x, how, found)
    assert np.array_equal(found, expected)

    out = np.empty((3, n), np.float32)
    kernels.sums(x, w, x, how, out)
    np.testing.assert_allclose(
        out, [(w * expected).sum(0), (w * expected**2).sum(0), (x * expected).sum(0)], 1e-4, 1e-3
    )

    scales = np.array([[scale], [2 * scale], [0.0]], np.float32).repeat(n, 1)
    errors, offsets = np.empty((3, n), np.float32), np.full((3, n), 0.1, np.float32)
    kernels.errors(x, w, scales, offsets, how, errors)
    for row, factor in zip(errors[:2], (1, 2), strict=True):
        q = nearest(x, values, np.float64(np.float32(0.1)), factor * np.float64(np.float32(scale)))
        np.testing.assert_allclose(row, (w * (factor * scale * q + 0.1 - x) ** 2).sum(0), 1e-3)
    np.testing.assert_allclose(errors[2], (w * (0.1 - x) ** 2).sum(0), 1e-4)


def test_a_whole_multiple_is_the_even_one_of_two():
    x = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, 6.5, 99.0, -99.0]], np.float32)
    found = np.empty_like(x)
    kernels.multiples(x, rounding(8, scale=1.0)[0], found)
    assert found.tolist() == [[0, 2, 2, 0, -2, 6, 7, -8]]


def test_the_best_scale_is_the_best_of_all_that_are_tried():
    x, w = drawn(32, 70), np.abs(drawn(32, 70, seed=1))
    how, values = rounding(70)
    extreme, shares = np.abs(x).max(0), np.linspace(-0.2, 0.3, 11).astype(np.float32)
    out = np.empty(70, np.float32)
    kernels.best_scales(x, w, w * x, extreme, shares, how, out)
    for i in range(70):
        fits = []
        for share in shares[np.abs(shares) > 1e-6]:
            q = nearest(x[:, i], values, 0, np.float64(extreme[i]) * share)
            scale = (w[:, i] * x[:, i] * q).sum() / (w[:, i] * q * q).sum()
            fits.append(((w[:, i] * (x[:, i] - scale * q) ** 2).sum(), scale))
        np.testing.assert_allclose(out[i], min(fits)[1], 1e-4)


@pytest.mark.parametrize("below_zero", [False, True])
def test_a_line_is_the_least_squares_line(below_zero):
    x, w = drawn(32, 70) + np.linspace(-1, 6, 70, dtype=np.float32), np.abs(drawn(32, 70, seed=1))
    how, values = rounding(70, low=0, high=15, scale=0.4)
    how = how._replace(offset=x.min(0))
    weight, mean = w.sum(0), (w * x).sum(0) / w.sum(0)
    three, out = np.empty((3, 70), np.float32), np.empty((2, 70), np.float32)
    kernels.sums(x, w, w * (x - mean), how, three)
    kernels.lines(three, mean, weight, below_zero, out)
    q = nearest(x, values, x.min(0).astype(np.float64), np.float64(np.float32(0.4)))
    above = 0
    for i in range(70):
        scale, offset = np.polyfit(q[:, i], x[:, i].astype(np.float64), 1, w=np.sqrt(w[:, i].astype(np.float64)))
        above += offset > 0
        if below_zero and offset > 0:
            scale, offset = (w * x * q)[:, i].sum() / (w * q * q)[:, i].sum(), 0.0
        np.testing.assert_allclose(out[:, i], [scale, offset], 1e-3, 1e-3)
    assert 0 < above < 70  # lines of both kinds


def test_what_is_found_for_a_group_does_not_depend_on_where_it_stands():
    x, w = drawn(32, 3 * LANES), np.abs(drawn(32, 3 * LANES, seed=1))
    how, _ = rounding(3 * LANES)
    whole, some = np.empty((3, 3 * LANES), np.float32), np.empty((3, LANES), np.float32)
    kernels.sums(x, w, w * x, how, whole)
    part = slice(7, 7 + LANES)
    cut = Rounding(*(one[part].copy() for one in how[:4]), *how[4:])
    kernels.sums(*(np.ascontiguousarray(one[:, part]) for one in (x, w, w * x)), cut, some)
    assert np.array_equal(some, whole[:, part])


def test_where_nothing_can_be_kept_on_disk_functions_are_compiled_all_the_same():
    names = {}
    exec("def double(a):\n    return 2 * a", names)  # noqa: S102 (of no file, so that numba finds no folder for it)
    assert compiled(names["double"])(21) == 42
