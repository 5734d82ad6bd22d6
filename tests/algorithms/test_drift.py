"""Weights for moved inputs, against least squares on the inputs themselves."""

import numpy as np
import pytest
import torch

from llmpack.algorithms.drift import (
    HELD_EVERY,
    HELD_TOKENS,
    DriftSum,
    follow,
    shift,
    tried,
    true_share,
    unseen_error,
)
from llmpack.algorithms.hessian import CrossSum, factorize
from llmpack.encodings import encoding


def streams(tokens=600, columns=20, seed=0):
    """Inputs as they were and as they are, float64 [tokens, columns] each."""
    rng = np.random.default_rng(seed)
    r = rng.normal(size=(tokens, columns)) @ rng.normal(size=(columns, columns))
    x = r @ (np.eye(columns) + 0.1 * rng.normal(size=(columns, columns))) + 0.3 * rng.normal(size=r.shape)
    return torch.from_numpy(r), torch.from_numpy(x)


def matrix(rows, columns=20):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def moments(r, x):
    """``E[x x^T]`` and ``E[(r - x) x^T]``."""
    return x.T @ x / len(x), (r - x).T @ x / len(x)


@pytest.mark.parametrize("rows", [7, 33])
@pytest.mark.parametrize("order", ["activation", "natural"])
def test_full_strength_is_least_squares_on_the_moved_inputs(order, rows):
    r, x = streams()
    W, damping = matrix(rows), 0.01
    H, moved = moments(r, x)
    V = follow(W, shift(W, moved, factorize(H, damping, order)), 1.0)
    # ridge towards W, written as rows of data: |W r - V x|^2 / tokens + level |V - W|^2
    level = damping * float(torch.diagonal(H).mean())
    data = np.vstack([x.numpy() / np.sqrt(len(x)), np.sqrt(level) * np.eye(20)])
    wanted = np.vstack([(r @ W.T).numpy() / np.sqrt(len(x)), np.sqrt(level) * W.T.numpy()])
    assert np.allclose(V.numpy(), np.linalg.lstsq(data, wanted, rcond=None)[0].T, atol=1e-9)


def test_it_lowers_the_error_and_half_of_it_lies_half_way():
    r, x = streams()
    W = matrix(7).float()
    H, moved = moments(r, x)
    S = shift(W, moved, factorize(H))
    wanted = r @ W.double().T

    def error(V):
        return float(((wanted - x @ V.double().T) ** 2).mean())

    full, half = follow(W, S, 1.0), follow(W, S, 0.5)
    assert half.dtype == torch.float32
    assert error(full) < error(half) < error(W)
    assert torch.allclose(half, (W + full) / 2, atol=1e-6)
    assert torch.equal(follow(W, S, 0.0), W)


def test_inputs_that_have_not_moved_change_nothing():
    r, _ = streams()
    H, moved = moments(r, r)
    assert not shift(matrix(7), moved, factorize(H)).any()


@pytest.mark.parametrize("rows", [7, 33])
def test_dead_columns_stay(rows):
    r, x = streams()
    r[:, 3], x[:, 3] = 0, 0
    H, moved = moments(r, x)
    assert not shift(matrix(rows), moved, factorize(H))[:, 3].any()


def test_the_true_share_is_the_multiple_that_fits_best_elsewhere():
    (r, x), W = streams(tokens=40), matrix(7)
    H, moved = moments(r, x)
    S = shift(W, moved, factorize(H))
    other_r, other_x = streams(tokens=900, seed=2)
    held = other_r - other_x, other_x
    shares = np.linspace(0, 1, 2001)
    errors = [float(((other_r @ W.T - other_x @ (W + share * S).T) ** 2).sum()) for share in shares]
    assert true_share(W, S, held) == pytest.approx(shares[int(np.argmin(errors))], abs=1e-3)
    assert true_share(W, -S, held) == 0
    assert true_share(W, S / 10, held) == 1
    assert true_share(W, S, None) == 0
    assert true_share(W, torch.zeros_like(S), held) == 0


def test_what_is_chance_is_not_followed():
    """Few tokens that have moved at random: least squares finds a shift, other tokens do not bear it out."""
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(40, 20, generator=rng, dtype=torch.float64)
    held_x = torch.randn(400, 20, generator=rng, dtype=torch.float64)
    W = matrix(7)
    H, moved = moments(x + torch.randn(x.shape, generator=rng), x)
    S = shift(W, moved, factorize(H))
    assert float(S.norm()) > 0.3 * float(W.norm())
    assert true_share(W, S, (torch.randn(held_x.shape, generator=rng).double(), held_x)) < 0.2


def test_a_drift_sum_keeps_every_eighth_sequence_out_of_the_fit():
    r, x = (one.float().reshape(20, 30, 20) for one in streams())
    total = DriftSum(20)
    assert total.add(r[:9], x[:9]) == [0, 1, 2, 3, 4, 5, 6, 8]
    assert total.add(r[9:], x[9:]) == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]
    kept = torch.arange(20) % HELD_EVERY == HELD_EVERY - 1
    _, moved = moments(r[~kept].flatten(0, 1).double(), x[~kept].flatten(0, 1).double())
    assert torch.allclose(total.moved().double(), moved, rtol=1e-4, atol=1e-5)
    drifted, now = total.held()
    assert torch.equal(now, x[kept].flatten(0, 1))
    assert torch.equal(drifted, (r - x)[kept].flatten(0, 1))


def test_no_more_is_kept_out_than_needed():
    r, x = torch.zeros(16, HELD_TOKENS - 24, 2), torch.ones(16, HELD_TOKENS - 24, 2)
    total = DriftSum(2)
    total.add(r[:7], x[:7])
    assert total.held() is None
    total.add(r[7:], x[7:])
    assert len(total.held()[0]) == HELD_TOKENS


def test_roundings_are_compared_by_what_they_do_to_inputs_kept_out(monkeypatch):
    kind, W = encoding("q4_1"), matrix(9, 64).float()
    r, x = (one.float() for one in streams(tokens=2000, columns=64))
    total = DriftSum(64)
    assert tried(total.held()) is None
    total.add(r.reshape(8, 250, 64), x.reshape(8, 250, 64))
    seen = tried(total.held())
    assert torch.equal(seen, x[-250:])
    assert tried((torch.zeros(1000, 1), torch.arange(1000.0)[:, None]))[:, 0].tolist() == list(range(0, 768, 2))
    rounded = kind.round(W, kind.fit(W))
    expected = sum(float((e @ one) ** 2) for e in (W - rounded.decode()).double() for one in seen.double())
    assert unseen_error(W, rounded, seen) == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr("llmpack.algorithms.drift.SLAB", 128)
    assert unseen_error(W, rounded, seen) == pytest.approx(expected, rel=1e-4)


def test_cross_sums_are_the_moments_of_pairs():
    r, x = streams(tokens=5000)
    total = CrossSum(20)
    total.add(r[:7].float().reshape(7, 1, 20), x[:7].float().reshape(7, 1, 20))
    total.add(r[7:].float(), x[7:].float())
    assert total.tokens == 5000
    assert torch.allclose(total.mean().double(), r.T @ x / len(x), rtol=1e-4, atol=1e-4)
