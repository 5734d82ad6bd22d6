"""Second moments and their factor, against numpy in float64."""

import numpy as np
import pytest
import torch

from llmpack.algorithms import hessian
from llmpack.algorithms.hessian import HessianSum, damped, factorize, rounding_order
from llmpack.errors import NumericalError


def inputs(tokens, columns, seed=0):
    """Correlated, with channels of very different size and a mean that is not zero."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(columns, columns)) / columns**0.5
    sizes = np.exp(rng.normal(size=columns))
    return torch.from_numpy(
        ((rng.normal(size=(tokens, columns)) @ mix + rng.normal(size=columns)) * sizes).astype("f4")
    )


def moments(x):
    wide = x.numpy().astype(np.float64)
    return wide.T @ wide / len(wide)


@pytest.mark.parametrize("columns", [7, hessian.TILE, hessian.TILE + 90])
def test_mean_is_the_second_moment_and_exactly_symmetric(columns):
    x = inputs(hessian.CHUNK + 905, columns)
    total = HessianSum(columns)
    total.add(x[:1000].reshape(10, 100, columns))
    total.add(x[1000:])
    mean = total.mean()
    assert mean.dtype == torch.float32
    assert total.tokens == len(x)
    assert torch.equal(mean, mean.T)
    wanted = moments(x)
    assert np.abs(mean.numpy() - wanted).max() <= 2e-6 * np.abs(wanted).max()


def test_half_precision_inputs_are_summed_in_float32():
    x = inputs(64, 12).to(torch.bfloat16)
    total = HessianSum(12)
    total.add(x)
    assert np.allclose(total.mean().numpy(), moments(x.float()), rtol=1e-5)


def test_a_long_sum_keeps_its_digits():
    """A million tokens, one sequence at a time: the error must not grow with their number."""
    total, wanted = HessianSum(4), np.zeros((4, 4))
    mix = inputs(4, 4)
    for seed in range(2000):
        x = torch.randn(512, 4, generator=torch.Generator().manual_seed(seed)) @ mix + 1
        total.add(x)
        wanted += moments(x) / 2000
    assert np.abs(total.mean().numpy() / wanted - 1).max() < 1e-5


def test_no_tokens_and_infinite_inputs_are_errors():
    with pytest.raises(NumericalError, match="no token"):
        HessianSum(4).mean()
    total = HessianSum(4)
    total.add(torch.tensor([[1.0, float("inf"), 0.0, 0.0]]))
    with pytest.raises(NumericalError, match="not finite"):
        total.mean()


@pytest.mark.parametrize("order", ["activation", "natural"])
def test_factor_times_its_transpose_is_the_damped_hessian(order):
    H = torch.from_numpy(moments(inputs(500, 40)))
    factor = factorize(H, 0.02, order, dtype=torch.float64)
    columns = factor.order
    expected = H.numpy() + 0.02 * np.trace(H.numpy()) / 40 * np.eye(40)
    assert torch.equal(factor.upper, torch.triu(factor.upper))
    assert np.allclose((factor.upper @ factor.upper.T).numpy(), expected[np.ix_(columns, columns)], rtol=1e-12)
    assert (factor.damping, factor.raised, factor.dead) == (0.02, (), 0)
    assert np.allclose(damped(H, 0.02).numpy(), expected, rtol=1e-12)


def test_activation_order_takes_the_largest_first_and_keeps_ties_in_place():
    H = torch.diag(torch.tensor([1.0, 3.0, 1.0, 5.0, 3.0]))
    assert rounding_order(H, "activation").tolist() == [3, 1, 4, 0, 2]
    assert rounding_order(H, "natural").tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="backwards"):
        rounding_order(H, "backwards")


def test_dead_columns_do_not_dilute_the_damping_and_stay_apart():
    H = torch.zeros(6, 6, dtype=torch.float64)
    H[:4, :4] = torch.from_numpy(moments(inputs(100, 4)))
    factor = factorize(H, 0.01, "natural", dtype=torch.float64)
    mean = float(torch.diagonal(H)[:4].mean())
    assert factor.dead == 2
    product = factor.upper @ factor.upper.T
    assert np.allclose(product[:4, :4].numpy(), (H[:4, :4] + 0.01 * mean * torch.eye(4)).numpy())
    assert torch.equal(product[4:, :4], torch.zeros(2, 4, dtype=torch.float64))
    assert bool((torch.diagonal(product)[4:] > 0).all())


def test_an_indefinite_hessian_raises_damping_in_steps_that_are_recorded():
    H = torch.eye(8, dtype=torch.float64)
    H[0, 1] = H[1, 0] = 1.03  # smallest eigenvalue -0.03
    factor = factorize(H, 0.01)
    assert factor.raised == (0.01, 0.02)
    assert factor.damping == pytest.approx(0.05)


def test_a_hopeless_hessian_is_an_error_with_numbers_and_a_cure():
    H = torch.eye(8, dtype=torch.float64)
    H[0, 1] = H[1, 0] = 9.0
    with pytest.raises(NumericalError, match=r"damping 1 .*tried 0\.01, 0\.02.*on_failure"):
        factorize(H, 0.01)


def test_zero_damping_on_too_few_tokens_is_raised_from_the_smallest():
    x = inputs(3, 16)
    factor = factorize(torch.from_numpy(moments(x)) - 1e-9 * torch.eye(16), 0.0)
    assert factor.damping >= hessian.SMALLEST_DAMPING
    assert factor.raised[0] == 0.0
