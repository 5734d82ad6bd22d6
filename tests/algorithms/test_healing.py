"""Healing by least squares, against least squares on the data themselves."""

import numpy as np
import pytest
import torch

from llmpack.algorithms.healing import gains, predicted_by
from llmpack.algorithms.hessian import CrossSum, HessianSum


def data(tokens=400, columns=12, rows=7, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(tokens, columns)) @ rng.normal(size=(columns, columns))
    return a, a @ rng.normal(size=(columns, rows)) + rng.normal(size=(tokens, rows))


@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_the_change_is_ridge_least_squares(damping):
    a, e = data()
    H, cross = a.T @ a / len(a), e.T @ a / len(a)
    found = predicted_by(torch.from_numpy(H), torch.from_numpy(cross), damping)
    # the penalty as rows of data
    level = damping * np.mean(np.diag(H))
    inputs = np.vstack([a / np.sqrt(len(a)), np.sqrt(level) * np.eye(a.shape[1])])
    wanted = np.vstack([e / np.sqrt(len(e)), np.zeros((a.shape[1], e.shape[1]))])
    assert np.allclose(found.numpy(), np.linalg.lstsq(inputs, wanted, rcond=None)[0].T, atol=1e-9)


def test_a_map_of_the_outputs_is_a_special_case():
    """ReplaceMe's T, folded into W, cannot beat what is fitted on the inputs of W, on the data that both saw."""
    a, _ = data()
    rng = np.random.default_rng(1)
    W = rng.normal(size=(7, 12))
    wanted = np.tanh(a @ W.T) + 0.1 * rng.normal(size=(len(a), 7))
    M = a @ W.T
    T = np.linalg.lstsq(M, wanted, rcond=None)[0]
    e = wanted - M
    change = predicted_by(torch.from_numpy(a.T @ a / len(a)), torch.from_numpy(e.T @ a / len(a)), 0.0).numpy()
    assert np.square(wanted - a @ (W + change).T).mean() <= np.square(wanted - M @ T).mean() + 1e-12


def test_sums_of_different_widths_are_their_products():
    a, e = data()
    own, cross = HessianSum(12), CrossSum(12, rows=7)
    for part in (slice(0, 100), slice(100, 400)):
        own.add(torch.from_numpy(a[part]))
        cross.add(torch.from_numpy(e[part]), torch.from_numpy(a[part]))
    assert np.allclose(cross.mean().numpy(), e.T @ a / len(a), rtol=1e-4, atol=1e-4)


def test_gains_are_least_squares_of_each_channel():
    a, e = data(rows=12)
    power, cross = np.mean(a**2, 0), np.mean(a * e, 0)
    found = gains(torch.from_numpy(power), torch.from_numpy(cross), 0.1).numpy()
    level = 0.1 * power.mean()
    for c in range(12):
        slow = sum(x * y for x, y in zip(a[:, c], e[:, c], strict=True)) / (
            sum(x * x for x in a[:, c]) + level * len(a)
        )
        assert found[c] == pytest.approx(slow, rel=1e-9)
    assert gains(torch.zeros(3), torch.zeros(3), 0.0).tolist() == [0, 0, 0]
