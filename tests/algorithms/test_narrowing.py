"""Choosing columns and making up for the others, against least squares on the inputs, subset by subset."""

from itertools import combinations

import numpy as np
import pytest
import torch

from llmpack.algorithms.hessian import HessianSum
from llmpack.algorithms.narrowing import choose, compensated, costs, energies, inverse_of

DAMPING = 0.01


def problem(columns=8, rows=5, tokens=300, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, columns)) @ rng.normal(size=(columns, columns)) * np.exp(rng.normal(size=columns))
    return rng.normal(size=(rows, columns)), x


def moments(x):
    return torch.from_numpy(x.T @ x / len(x))


def slow_refit(W, x, stays, damping):
    """Ridge least squares on rows of data, each column pulled to where it was; and what error is left."""
    penalty = np.sqrt(damping * np.mean(x[:, stays] ** 2, 0))
    inputs = np.vstack([x[:, stays] / np.sqrt(len(x)), np.diag(penalty)])
    wanted = np.vstack([x @ W.T / np.sqrt(len(x)), penalty[:, None] * W[:, stays].T])
    V = np.linalg.lstsq(inputs, wanted, rcond=None)[0].T
    return V, np.square(x @ W.T - x[:, stays] @ V.T).sum() / len(x)


@pytest.mark.parametrize("stays", [[0, 2, 3, 6], [7], list(range(8))])
def test_what_is_left_is_ridge_least_squares(stays):
    W, x = problem()
    H = moments(x)
    found = compensated(torch.from_numpy(W), H, torch.tensor(stays), DAMPING).numpy()
    assert np.allclose(found, slow_refit(W, x, stays, DAMPING)[0], atol=1e-9)


@pytest.mark.parametrize("unit", [1, 2])
def test_the_cost_of_a_unit_is_the_error_that_is_left_without_it(unit):
    W, x = problem()
    found = costs(torch.from_numpy(W), inverse_of(moments(x), 0.0), unit).numpy()
    for u in range(8 // unit):
        stays = [c for c in range(8) if c // unit != u]
        assert found[u] == pytest.approx(slow_refit(W, x, stays, 0.0)[1], rel=1e-6)


@pytest.mark.parametrize("unit", [1, 2])
def test_the_energy_of_a_unit_is_the_error_without_it_and_without_a_cure(unit):
    W, x = problem()
    found = energies(torch.from_numpy(W), moments(x), unit).numpy()
    for u in range(8 // unit):
        chosen = slice(u * unit, (u + 1) * unit)
        assert found[u] == pytest.approx(np.square(x[:, chosen] @ W[:, chosen].T).sum() / len(x), rel=1e-9)


@pytest.mark.parametrize(("unit", "keep"), [(1, 5), (2, 2)])
def test_choosing_one_by_one_is_greedy_least_squares(unit, keep):
    W, x = problem(seed=3)
    units = list(range(8 // unit))
    while len(units) > keep:
        errors = {}
        for u in units:
            stays = [c for v in units if v != u for c in range(v * unit, (v + 1) * unit)]
            errors[u] = slow_refit(W, x, stays, 0.0)[1]
        units.remove(min(errors, key=errors.__getitem__))
    assert choose(torch.from_numpy(W), moments(x), unit, keep, 0.0, rounds=99).tolist() == units


def test_the_choice_is_near_the_best_of_all_and_better_than_by_energy():
    ratios = []
    for seed in range(6):
        W, x = problem(seed=seed)
        H = moments(x)
        best = min(slow_refit(W, x, list(stays), 0.0)[1] for stays in combinations(range(8), 5))
        ours = slow_refit(W, x, choose(torch.from_numpy(W), H, 1, 5, 0.0).tolist(), 0.0)[1]
        strongest = np.argsort(-energies(torch.from_numpy(W), H, 1).numpy())[:5]
        assert ours <= slow_refit(W, x, sorted(strongest), 0.0)[1] + 1e-9
        ratios.append(ours / best)
    assert np.median(ratios) < 1.2


def test_columns_that_copy_others_go_first_and_cost_nothing():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 6))
    x[:, 4], x[:, 5] = 2 * x[:, 0], x[:, 1] - x[:, 2]
    W = rng.normal(size=(4, 6))
    H = HessianSum(6)
    H.add(torch.from_numpy(x))
    stays = choose(torch.from_numpy(W), H.mean(), 1, 4, 1e-6)
    V = compensated(torch.from_numpy(W), H.mean(), stays, 1e-8).numpy()
    assert np.allclose(x[:, stays.numpy()] @ V.T, x @ W.T, atol=1e-2)


def test_looks_may_take_several_at_once():
    W, x = problem(columns=64, rows=20, tokens=2000, seed=2)
    H = moments(x)
    errors = []
    for rounds in (1, 8, 99):
        stays = choose(torch.from_numpy(W), H, 1, 40, DAMPING, rounds=rounds)
        assert len(stays) == 40
        errors.append(slow_refit(W, x, stays.tolist(), 0.0)[1])
    assert max(errors) < 1.25 * min(errors)
