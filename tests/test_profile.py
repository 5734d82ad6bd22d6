"""Phases: exclusive times, rates, and no cost while nobody asks."""

import time

import pytest

from llmpack.profile import phase, profiling, uncount


def test_an_outer_phase_counts_what_its_inner_ones_leave():
    with profiling() as profile:
        start = time.perf_counter()
        with phase("outer", tokens=10):
            time.sleep(0.02)
            with phase("inner", flops=4e9):
                time.sleep(0.05)
            time.sleep(0.01)
        whole = time.perf_counter() - start
    outer, inner = profile.phases["outer"], profile.phases["inner"]
    assert inner.seconds >= 0.05
    assert outer.seconds >= 0.03
    assert outer.seconds + inner.seconds <= whole
    assert (outer.tokens, inner.flops, outer.visits) == (10, 4e9, 1)


def test_visits_add_up_and_rates_follow_from_them():
    with profiling() as profile:
        for _ in range(3):
            with phase("forward", tokens=100, flops=1e6, numbers=50):
                time.sleep(0.01)
        uncount("forward", 1e6)
    (row,) = profile.rows()
    seconds = profile.phases["forward"].seconds
    assert row["tokens_per_second"] == pytest.approx(300 / seconds, rel=1e-2)
    assert row["gflops"] == pytest.approx(2e6 / 1e9 / seconds, abs=0.01)
    assert row["share"] == 1.0


def test_a_phase_that_fails_is_closed():
    with profiling() as profile, phase("outer"):
        with pytest.raises(KeyError), phase("inner"):
            raise KeyError
        assert profile._open == ["outer"]


def test_without_a_profile_nothing_is_counted():
    with phase("alone", tokens=1):
        pass
    with profiling() as profile:
        pass
    assert profile.rows() == []
