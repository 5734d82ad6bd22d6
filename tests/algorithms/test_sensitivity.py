"""Scores against their definitions, in float64, and against what GPTQ really does."""

import pytest
import torch

from llmpack.algorithms.gptq import gptq
from llmpack.algorithms.hessian import factorize
from llmpack.algorithms.sensitivity import (
    compensated_divergence,
    concentration,
    draw_labels,
    leverage,
    predicted_divergence,
    sample_rows,
)
from llmpack.encodings import encoding


def inputs(tokens, columns, seed=0):
    """Correlated inputs of channels that differ in size, as of a trained model."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(tokens, columns // 4, generator=generator)
    mixed = latent @ torch.randn(columns // 4, columns, generator=generator) / columns**0.5
    noise = 0.3 * torch.randn(tokens, columns, generator=generator)
    return (mixed + noise) * torch.exp(0.7 * torch.randn(columns, generator=generator))


def test_predicted_divergence_is_half_of_the_weighted_squared_outputs():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, 12, generator=generator, dtype=torch.float64)
    g = torch.randn(50, 7, generator=generator, dtype=torch.float64)
    dW = torch.randn(7, 12, generator=generator, dtype=torch.float64)
    slow = 0.0
    for o in range(7):
        G = sum(float(g[t, o]) ** 2 for t in range(50)) / 50
        slow += 0.5 * G * sum(float(dW[o] @ x[t]) ** 2 for t in range(50)) / 50
    assert predicted_divergence(dW, x.T @ x / 50, g.square().mean(0)) == pytest.approx(slow, rel=1e-12)


@pytest.mark.parametrize("name", ["q4_0", "iq4_nl", "q5_1", "q8_0", "q3_k"])
def test_the_compensated_divergence_is_what_gptq_comes_to(name):
    columns = 512
    x = inputs(6000, columns)
    H = x.T @ x / len(x)
    generator = torch.Generator().manual_seed(2)
    W = torch.randn(96, columns, generator=generator) / columns**0.5
    weights = torch.exp(torch.randn(96, generator=generator)).double()
    kind, factor = encoding(name), factorize(H, 0.01)
    grid = kind.fit(W, H.diagonal())
    nearest = kind.round(W, grid).decode() - W
    real = predicted_divergence(gptq(W, H, grid, kind, damping=0.01).decode() - W, H, weights)
    expected = compensated_divergence(nearest, leverage(factor, H), weights)
    assert expected == pytest.approx(real, rel=0.15)
    assert expected < 0.75 * predicted_divergence(nearest, H, weights)


def test_leverage_is_what_later_columns_cannot_absorb():
    x = inputs(4000, 24).double()
    H = x.T @ x / len(x)
    H[3] = H[:, 3] = 0  # a dead column
    found = leverage(factorize(H, 1e-9), H)
    order = sorted(range(24), key=lambda k: -float(H[k, k]))
    assert found[3] == 0
    for at, k in enumerate(order):
        later = [j for j in order[at + 1 :] if j != 3]
        if k != 3:
            explained = H[k, later] @ torch.linalg.solve(H[later][:, later], H[later, k]) if later else 0.0
            assert float(found[k]) == pytest.approx(float(H[k, k] - explained), rel=1e-5)


def test_labels_follow_the_predictions():
    logits = torch.tensor([[2.0, 0.0, -30.0, 1.0]]).expand(20_000, 4)
    labels = draw_labels(logits, torch.rand(20_000, generator=torch.Generator().manual_seed(0)))
    shares = torch.bincount(labels, minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.softmax(logits[0], 0), atol=0.01, rtol=0)
    assert draw_labels(logits[:2], torch.tensor([0.0, 1.0])).tolist() == [0, 3]


def test_sampled_rows_estimate_the_sum_over_all():
    generator = torch.Generator().manual_seed(3)
    sizes = torch.exp(2 * torch.randn(5000, generator=generator)).double()
    real = sizes * torch.exp(0.2 * torch.randn(5000, generator=generator)).double()
    sample = sample_rows(sizes, 200)
    assert len(sample.rows) <= 200
    assert float((real[sample.rows] * sample.weights).sum()) == pytest.approx(float(real.sum()), rel=0.03)
    assert float((sizes[sample.rows] * sample.weights).sum()) == pytest.approx(float(sizes.sum()), rel=1e-9)


def test_few_rows_are_all_taken_and_empty_ones_never_if_some_are_left_out():
    assert sample_rows(torch.tensor([0.0, 1.0]), 2).weights.tolist() == [1.0, 1.0]
    sample = sample_rows(torch.tensor([0.0, 5.0, 0.0, 1.0, 1.0]), 2)
    assert sample.rows.tolist() == [1, 3]
    assert sample.weights.tolist() == [1.0, 2.0]
    assert sample_rows(torch.zeros(5), 2).rows.tolist() == []


def test_concentration_is_the_share_of_the_strongest_columns():
    H = torch.diag(torch.tensor([8.0, 1.0, 1.0, 0.0]))
    assert concentration(H) == pytest.approx(0.8)
    assert concentration(H, 0.5) == pytest.approx(0.9)
    assert concentration(torch.zeros(3, 3)) == 0.0
