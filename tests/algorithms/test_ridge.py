"""Ridge least squares from moments, against least squares on the data themselves."""

import numpy as np
import pytest
import torch

from llmpack.algorithms.ridge import ridge_regression


def data(tokens=400, columns=12, rows=7, seed=0):
    """Inputs whose sizes differ by orders of magnitude."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, columns)) @ rng.normal(size=(columns, columns)) * np.exp(3 * rng.normal(size=columns))
    return x, x @ rng.normal(size=(columns, rows)) + rng.normal(size=(tokens, rows))


def moments(x, y):
    return torch.from_numpy(y.T @ x / len(x)), torch.from_numpy(x.T @ x / len(x))


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.5, 2.0])
def test_it_is_least_squares_with_the_penalty_as_rows_of_data(damping):
    x, y = data()
    penalty = np.diag(np.sqrt(damping * np.mean(x**2, 0)))
    inputs = np.vstack([x / np.sqrt(len(x)), penalty])
    wanted = np.vstack([y / np.sqrt(len(y)), np.zeros((x.shape[1], y.shape[1]))])
    slow = np.linalg.lstsq(inputs, wanted, rcond=None)[0].T
    found = ridge_regression(*moments(x, y), damping).numpy()
    assert np.allclose(found, slow, rtol=1e-7, atol=1e-9 * np.abs(slow).max())


def test_the_units_of_an_input_do_not_matter():
    x, y = data()
    units = 10.0 ** np.arange(-6, 6)
    found = ridge_regression(*moments(x * units, y), 0.3).numpy()
    assert np.allclose(found * units, ridge_regression(*moments(x, y), 0.3).numpy(), rtol=1e-6)


def test_inputs_that_are_always_zero_are_mapped_to_nothing():
    x, y = data()
    x[:, [2, 5]] = 0
    found = ridge_regression(*moments(x, y), 0.1).numpy()
    rest = [c for c in range(12) if c not in (2, 5)]
    assert not found[:, [2, 5]].any()
    assert np.allclose(found[:, rest], ridge_regression(*moments(x[:, rest], y), 0.1).numpy(), rtol=1e-9)
