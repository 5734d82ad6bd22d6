"""Scores of blocks, against plain loops in Python floats."""

import math

import pytest
import torch

from llmpack.algorithms.saliency import angular_distance, influence


def states(seed, shape=(3, 5, 8)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slow_cosine(x, y):
    dot = math.fsum(a * b for a, b in zip(x, y, strict=True))
    return dot / math.sqrt(math.fsum(a * a for a in x) * math.fsum(b * b for b in y))


def test_influence_is_one_minus_the_mean_cosine():
    before, after = states(1), states(1) + 0.3 * states(2)
    pairs = zip(before.double().reshape(-1, 8).tolist(), after.double().reshape(-1, 8).tolist(), strict=True)
    cosines = [slow_cosine(x, y) for x, y in pairs]
    assert influence(before, after) == pytest.approx(1 - math.fsum(cosines) / len(cosines), abs=1e-12)


def test_the_angle_is_that_of_last_tokens():
    before, after = states(3), states(3) + 0.5 * states(4)
    pairs = zip(before[:, -1].double().tolist(), after[:, -1].double().tolist(), strict=True)
    angles = [math.acos(slow_cosine(x, y)) / math.pi for x, y in pairs]
    assert angular_distance(before, after) == pytest.approx(math.fsum(angles) / len(angles), abs=1e-12)


def test_states_that_only_grow_have_no_influence():
    assert influence(states(5), 3 * states(5)) == pytest.approx(0, abs=1e-12)
    assert angular_distance(states(5), -states(5)) == pytest.approx(1, abs=1e-6)
    assert influence(torch.zeros(1, 1, 8), states(6, (1, 1, 8))) == 1
