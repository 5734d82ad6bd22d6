"""Weights for moved inputs, against least squares on the inputs themselves."""

import numpy as np
import pytest
import torch

from llmpack.algorithms.drift import drift_map, follow
from llmpack.algorithms.hessian import CrossSum, HessianSum, factorize


def streams(tokens=600, columns=20, seed=0):
    rng = np.random.default_rng(seed)
    r = rng.normal(size=(tokens, columns)) @ rng.normal(size=(columns, columns))
    x = r @ (np.eye(columns) + 0.1 * rng.normal(size=(columns, columns))) + 0.3 * rng.normal(size=r.shape)
    return torch.from_numpy(r), torch.from_numpy(x)


def moments(r, x):
    return x.T @ x / len(x), r.T @ x / len(x)


@pytest.mark.parametrize("order", ["activation", "natural"])
def test_full_strength_is_least_squares_on_the_moved_inputs(order):
    r, x = streams()
    W = torch.randn(7, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    damping = 0.01
    H, cross = moments(r, x)
    moved = follow(W, drift_map(H, cross, factorize(H, damping, order)), 1.0)
    # ridge towards W, written as rows of data: |W r - V x|^2 / tokens + level |V - W|^2
    level = damping * float(torch.diagonal(H).mean())
    rows = np.vstack([x.numpy() / np.sqrt(len(x)), np.sqrt(level) * np.eye(20)])
    wanted = np.vstack([(r @ W.T).numpy() / np.sqrt(len(x)), np.sqrt(level) * W.T.numpy()])
    assert np.allclose(moved.numpy(), np.linalg.lstsq(rows, wanted, rcond=None)[0].T, atol=1e-9)


def test_it_lowers_the_error_and_half_of_it_lies_half_way():
    r, x = streams()
    W = torch.randn(7, 20, generator=torch.Generator().manual_seed(1))
    H, cross = moments(r, x)
    drift = drift_map(H, cross, factorize(H))
    wanted = r @ W.double().T

    def error(V):
        return float(((wanted - x @ V.double().T) ** 2).mean())

    full, half = follow(W, drift, 1.0), follow(W, drift, 0.5)
    assert half.dtype == torch.float32
    assert error(full) < error(half) < error(W)
    assert torch.allclose(half, (W + full) / 2, atol=1e-6)
    assert torch.equal(follow(W, drift, 0.0), W)


def test_inputs_that_have_not_moved_change_nothing():
    r, _ = streams()
    H, cross = moments(r, r)
    assert torch.equal(drift_map(H, cross, factorize(H)), torch.zeros(20, 20, dtype=torch.float64))


def test_dead_columns_stay():
    r, x = streams()
    r[:, 3], x[:, 3] = 0, 0
    H, cross = moments(r, x)
    drift = drift_map(H, cross, factorize(H))
    assert not drift[3].any()
    assert not drift[:, 3].any()


def test_cross_sums_are_the_moments_of_pairs():
    r, x = streams(tokens=5000)
    total = CrossSum(20)
    total.add(r[:7].float().reshape(7, 1, 20), x[:7].float().reshape(7, 1, 20))
    total.add(r[7:].float(), x[7:].float())
    own = HessianSum(20)
    own.add(x.float())
    H, cross = moments(r, x)
    assert total.tokens == 5000
    assert torch.allclose(total.mean().double(), cross, rtol=1e-4, atol=1e-4)
    assert torch.allclose(own.mean().double(), H, rtol=1e-4, atol=1e-4)
