"""Divergences against the sums of their definition, in plain Python floats."""

import math

import pytest
import torch

from llmpack.algorithms.divergence import (
    CHUNK,
    Comparison,
    Divergence,
    Wanted,
    compare,
    kl_divergence,
    paired_ratio,
)
from llmpack.errors import NumericalError


def logits(tokens, vocabulary=11, seed=0, size=6.0):
    return size * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed))


def probabilities(row):
    top = max(row)
    weights = [math.exp(v - top) for v in row]
    return [w / math.fsum(weights) for w in weights]


def slow_kl(p_rows, q_rows):
    result = []
    for p_row, q_row in zip(p_rows.double().tolist(), q_rows.double().tolist(), strict=True):
        p, q = probabilities(p_row), probabilities(q_row)
        result.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return result


@pytest.mark.parametrize("tokens", [1, CHUNK, CHUNK + 3])
def test_kl_is_that_of_the_definition(tokens):
    p, q = logits(tokens), logits(tokens, seed=1)
    ours = kl_divergence(p, q)
    assert ours.dtype == torch.float64
    assert ours.tolist() == pytest.approx(slow_kl(p, q), rel=1e-12)


def test_kl_ignores_a_shift_and_is_zero_for_equal_models():
    p = logits(9)
    assert kl_divergence(p, p + 5).abs().max() < 1e-12
    assert kl_divergence(p, p).tolist() == [0.0] * 9


def test_tiny_divergences_keep_their_digits():
    p = logits(5, size=1.0).double()
    q = p + 1e-5 * logits(5, seed=2, size=1.0).double()
    assert kl_divergence(p, q).tolist() == pytest.approx(slow_kl(p, q), rel=1e-4, abs=1e-18)


def test_many_models_are_compared_with_one_nearly_as_exactly():
    p, q = logits(40), logits(40, seed=1) + 100
    wanted = Wanted.of(p)
    assert wanted.kl(q).tolist() == pytest.approx(slow_kl(p, q), abs=1e-4)
    assert wanted.kl(p).max() < 1e-5
    with pytest.raises(NumericalError, match="not finite"):
        wanted.kl(torch.full((40, 11), math.inf))


def test_unequal_shapes_are_errors():
    with pytest.raises(ValueError, match="differ in shape"):
        kl_divergence(logits(3), logits(4))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_logits_that_are_not_finite_are_errors(value, which):
    pair = [logits(CHUNK + 5), logits(CHUNK + 5, seed=1)]
    pair[which][CHUNK + 2, 1] = value
    with pytest.raises(NumericalError, match=f"token {CHUNK + 2} "):
        kl_divergence(*pair)


def slow_surprise(rows, targets):
    pairs = zip(rows.double().tolist(), targets.tolist(), strict=False)
    return [-math.log(probabilities(row)[target]) for row, target in pairs]


@pytest.mark.parametrize("known", [70, 69, 0])
def test_a_comparison_pays_for_the_tokens_that_follow(known):
    p, q = logits(70), logits(70, seed=1)
    p[3, 5] = p[3, 7] = p[3].max() + 1  # a tie: the first of them counts
    q[3, 5] = q[3].max() + 1
    targets = (torch.arange(70) % 11)[:known]
    part = compare(p, q, targets)
    assert part.kl.tolist() == kl_divergence(p, q).tolist()
    excess = [b - a for a, b in zip(slow_surprise(p, targets), slow_surprise(q, targets), strict=True)]
    assert part.excess.tolist() == pytest.approx(excess, rel=1e-12, abs=1e-14)
    same = [a.index(max(a)) == b.index(max(b)) for a, b in zip(p.tolist(), q.tolist(), strict=True)]
    assert part.agree.tolist() == same
    assert part.agree[3]


def test_parts_of_a_text_are_joined():
    p, q, targets = logits(12), logits(12, seed=1), torch.arange(11) % 11
    whole = compare(p, q, targets)
    joined = Comparison.joined([compare(p[:5], q[:5], targets[:5]), compare(p[5:], q[5:], targets[5:])])
    for name in ("kl", "agree", "excess"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))


def test_the_summary_counts_tokens_and_takes_stretches_as_independent():
    parts = [compare(logits(n, seed=n), logits(n, seed=n + 50), torch.arange(n - 1) % 11) for n in (20, 30, 41)]
    whole = Divergence.of(parts)
    kl = [v for part in parts for v in part.kl.tolist()]
    assert whole.tokens == 91
    assert whole.mean == pytest.approx(math.fsum(kl) / 91)
    assert whole.max == max(kl)
    assert sorted(kl)[-2] <= whole.p99 <= whole.max
    assert whole.top1 == pytest.approx(sum(bool(v) for part in parts for v in part.agree) / 91)
    excess = [v for part in parts for v in part.excess.tolist()]
    assert whole.ppl_ratio == pytest.approx(math.exp(math.fsum(excess) / len(excess)))
    residual = [float(part.kl.sum()) - whole.mean * part.kl.numel() for part in parts]
    assert whole.stderr == pytest.approx(math.sqrt(3 / 2 * math.fsum(r * r for r in residual)) / 91)


def test_one_stretch_takes_tokens_as_independent():
    kl = kl_divergence(logits(40), logits(40, seed=1))
    one = Divergence.of([Comparison(kl, torch.ones(40, dtype=torch.bool), torch.zeros(0, dtype=torch.float64))])
    assert one.stderr == pytest.approx(float(kl.std()) / math.sqrt(40))
    assert math.isnan(one.ppl_ratio)
    with pytest.raises(ValueError, match="no tokens"):
        Divergence.of([])


def test_the_bound_of_a_paired_ratio_covers_the_truth_in_about_95_of_100():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        hard = torch.rand(60, 20, generator=generator, dtype=torch.float64) + torch.rand(60, 1, generator=generator)
        noise = 0.3 * torch.rand(60, 20, generator=generator)
        ratio = paired_ratio(list(0.6 * hard + noise - 0.15), list(hard))
        covered += ratio.upper > 0.6
        assert abs(ratio.value - 0.6) < 0.05
    assert 360 <= covered <= 396


def test_a_ratio_needs_the_same_text():
    with pytest.raises(ValueError, match="same two or more"):
        paired_ratio([torch.ones(3)], [torch.ones(3)])
