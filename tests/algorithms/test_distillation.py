"""The loss of a distillation against its definition in plain Python floats, and its gradient."""

import math

import pytest
import torch

from llmpack.algorithms.distillation import likeliest, relative_error, tail_kl


def logits(tokens=6, vocabulary=11, seed=0):
    return 3 * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed))


def softmax(row, temperature):
    weights = [math.exp(v / temperature) for v in row]
    return [w / math.fsum(weights) for w in weights]


def slow_loss(p_row, q_row, k, temperature):
    p, q = softmax(p_row, temperature), softmax(q_row, temperature)
    top = sorted(range(len(p)), key=p.__getitem__)[-k:]
    total = math.fsum(p[i] * math.log(p[i] / q[i]) for i in top)
    rest_p, rest_q = 1 - math.fsum(p[i] for i in top), 1 - math.fsum(q[i] for i in top)
    return temperature**2 * (total + (rest_p * math.log(rest_p / rest_q) if k < len(p) else 0))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 4, 11])
def test_the_loss_is_that_of_the_definition(k, temperature):
    p, q = logits(), logits(seed=1)
    found = tail_kl(q, *likeliest(p, k, temperature), temperature)
    expected = [slow_loss(a, b, k, temperature) for a, b in zip(p.double().tolist(), q.double().tolist(), strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_student_that_says_the_same_pays_nothing_and_has_no_gradient():
    p = logits()
    q = (p + 7).requires_grad_(True)
    loss = tail_kl(q, *likeliest(p, 3)).sum()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    assert q.grad.abs().max() < 1e-5


def test_what_lies_in_the_tail_is_not_free():
    """A student that is sure of the teacher's one token pays for the rest of the teacher's probability."""
    p = torch.tensor([[2.0, 1.0, 0.0]])
    sure = torch.tensor([[20.0, 1.0, 0.0]])
    assert float(tail_kl(sure, *likeliest(p, 1))) > 1


def test_more_tokens_than_there_are_is_all_of_them():
    assert likeliest(logits(), 99)[0].shape == (6, 11)


def test_hidden_states_are_compared_relative_to_their_size():
    student, teacher = logits(4, 5), 100 * logits(4, 5, seed=2)
    teacher[3] = 0
    expected = [
        math.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / math.fsum(b * b for b in y)
        for x, y in zip(student[:3].tolist(), teacher[:3].tolist(), strict=True)
    ]
    found = relative_error(student[None], teacher[None].half())
    assert found.shape == (1, 4)
    assert found[0, :3].tolist() == pytest.approx(expected, rel=1e-2)
    assert relative_error(student, teacher)[:3].tolist() == pytest.approx(expected, rel=1e-5)
