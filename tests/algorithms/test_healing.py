"""Healing by least squares, against least squares on the data themselves."""

import numpy as np
import pytest
import torch

from llmpack.algorithms.healing import gains
from llmpack.algorithms.hessian import CrossSum, HessianSum
from llmpack.algorithms.ridge import over


def data(tokens=400, columns=12, rows=7, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(tokens, columns)) @ rng.normal(size=(columns, columns))
    return a, a @ rng.normal(size=(columns, rows)) + rng.normal(size=(tokens, rows))


def test_a_map_of_the_outputs_is_a_special_case():
    """ReplaceMe's T, folded into W, cannot beat what is fitted on the inputs of W, on the data that both saw."""
    a, _ = data()
    rng = np.random.default_rng(1)
    W = rng.normal(size=(7, 12))
    wanted = np.tanh(a @ W.T) + 0.1 * rng.normal(size=(len(a), 7))
    M = a @ W.T
    T = np.linalg.lstsq(M, wanted, rcond=None)[0]
    e = wanted - M
    change = over(torch.from_numpy(e.T @ a / len(a)), torch.from_numpy(a.T @ a / len(a)), 0.0).numpy()
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
    for c in range(12):
        slow = sum(x * y for x, y in zip(a[:, c], e[:, c], strict=True)) / (1.1 * sum(x * x for x in a[:, c]))
        assert found[c] == pytest.approx(slow, rel=1e-9)
    assert gains(torch.zeros(3), torch.zeros(3), 0.0).tolist() == [0, 0, 0]
