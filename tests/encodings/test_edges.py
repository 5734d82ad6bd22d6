"""Inputs at the ends of what can be stored, and beyond."""

import numpy as np
import pytest
import torch

from llmpack.encodings import encoding
from tests.encodings import oracle


def restored(name, W, importance=None):
    kind = encoding(name)
    values = kind.decode(kind.encode(W, importance), W.shape[1])
    assert bool(torch.isfinite(values).all())
    return values


@pytest.mark.parametrize("name", oracle.GRIDS)
def test_zeros_stay_zeros(name):
    W = oracle.numbers((4, 512))
    W[1], W[2, :256], W[3, 32:64] = 0, 0, 0
    for importance in (None, oracle.importance_of(512), torch.zeros(512)):
        values = restored(name, W, importance)
        assert not values[1].any()
        assert not values[2, :256].any()


@pytest.mark.parametrize("value", [1.0, -1.0, 0.3, -123.4])
@pytest.mark.parametrize("name", oracle.GRIDS)
def test_constant_rows_are_kept(name, value):
    values = restored(name, torch.full((2, 256), value))
    worst = 0.02 if name in ("q2_k", "q3_k", "q4_k", "q5_k", "iq4_xs") else 0.001
    if name == "mxfp4":  # powers of two as scales: between 8 and 12 of them lies nothing
        worst = 0.2
    assert float((values - value).abs().max()) <= worst * abs(value)


@pytest.mark.parametrize("name", oracle.GRIDS)
def test_two_values_are_kept_where_ties_are_everywhere(name):
    W = torch.tensor([0.5, -0.5]).repeat(2, 128)
    assert float((restored(name, W) - W).abs().max()) < 0.1


@pytest.mark.parametrize("scale", [1e-38, 1e-12, 1e-7, 1e-5, 1e3])
@pytest.mark.parametrize("name", oracle.GRIDS)
def test_tiny_and_huge_numbers_are_no_worse_than_zeros(name, scale):
    W = oracle.numbers((2, 512), scale=1.0) * scale
    error = oracle.weighted_error(W, restored(name, W, oracle.importance_of(512)), oracle.importance_of(512))
    zeros = oracle.weighted_error(W, torch.zeros_like(W), oracle.importance_of(512))
    assert error <= zeros * (1 + 1e-6)
    if scale >= 1e-5:
        assert error < 0.2 * zeros


@pytest.mark.parametrize("name", oracle.GRIDS)
def test_the_largest_numbers_are_kept_and_larger_ones_refused(name):
    kind = encoding(name)
    top = 65504.0 * kind.reach
    W = torch.linspace(-top, top, 256)[None]
    assert oracle.weighted_error(W, restored(name, W)) < 0.1 * float(W.double().square().sum())
    with pytest.raises(ValueError, match="the largest number that"):
        kind.fit(W * 1.01)


@pytest.mark.parametrize("name", oracle.GRIDS)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_numbers_that_are_not_finite_are_refused(name, bad):
    W = torch.zeros(2, 256)
    W[1, 7] = bad
    for work in (encoding(name).fit, encoding(name).encode):
        with pytest.raises(ValueError, match="row 1, column 7"):
            work(W)


@pytest.mark.parametrize("name", oracle.GRIDS)
def test_bad_importance_is_refused(name):
    kind, W = encoding(name), torch.zeros(2, 256)
    for wrong in (torch.ones(255), torch.ones(2, 256)):
        with pytest.raises(ValueError, match="importance has shape"):
            kind.fit(W, wrong)
    for entry in (-1.0, float("nan"), float("inf")):
        importance = torch.ones(256)
        importance[3] = entry
        with pytest.raises(ValueError, match="negative, infinite or NaN"):
            kind.fit(W, importance)


@pytest.mark.parametrize("name", oracle.GRIDS)
def test_shapes_that_do_not_fit_are_refused(name):
    kind = encoding(name)
    with pytest.raises(ValueError, match=f"not a multiple of {name}'s block"):
        kind.fit(torch.zeros(2, kind.block + 16))
    with pytest.raises(ValueError, match="has 3 dimensions"):
        kind.fit(torch.zeros(1, 2, kind.block))
    with pytest.raises(ValueError, match="nothing to store"):
        kind.fit(torch.zeros(0, kind.block))


@pytest.mark.parametrize("name", oracle.GRIDS)
def test_importance_of_zero_means_rounding_to_something_near(name):
    W, importance = oracle.numbers((4, 512)), torch.ones(512)
    importance[:256] = 0
    importance[300:330] = 0
    values = restored(name, W, importance)
    for part in (slice(0, 256), slice(300, 330)):
        left = float((values[:, part] - W[:, part]).square().sum() / W[:, part].square().sum())
        assert left < 0.5


@pytest.mark.parametrize("name", oracle.GRIDS)
def test_half_precision_and_strided_input_is_taken_as_it_is(name):
    kind, W = encoding(name), oracle.numbers((4, 512)).bfloat16()
    expected = kind.encode(W.float())
    np.testing.assert_array_equal(kind.encode(W), expected)
    np.testing.assert_array_equal(kind.encode(W.float().T.contiguous().T), expected)
