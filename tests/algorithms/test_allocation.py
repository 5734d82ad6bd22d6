"""The allocation against every choice there is, and against a general solver at the size of a real model."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpack.algorithms.allocation import Item, allocate, frontier


def every_choice(items, budget):
    """The least cost of all choices that fit, by looking at each."""
    return min(
        sum(item.costs[c] for item, c in zip(items, choice, strict=True))
        for choice in itertools.product(*(range(len(item.sizes)) for item in items))
        if sum(item.sizes[c] for item, c in zip(items, choice, strict=True)) <= budget
    )


def totals(items, choice):
    pairs = list(zip(items, choice, strict=True))
    return sum(item.sizes[c] for item, c in pairs), sum(item.costs[c] for item, c in pairs)


option = st.tuples(st.integers(0, 12), st.integers(0, 20).map(lambda n: n / 4))
item = st.lists(option, min_size=1, max_size=4).map(lambda pairs: Item(*zip(*pairs, strict=True)))


@settings(max_examples=300, deadline=None)
@given(st.lists(item, min_size=1, max_size=5), st.integers(0, 40))
def test_no_choice_that_fits_is_better(items, extra):
    budget = sum(min(one.sizes) for one in items) + extra
    size, cost = totals(items, allocate(items, budget))
    assert size <= budget
    assert cost == pytest.approx(every_choice(items, budget), abs=1e-12)


def model_like(blocks, seed):
    """Tensors of a model: few different sizes, costs that fall with bits and differ widely between tensors."""
    generator = np.random.default_rng(seed)
    bits = np.array([4.25, 4.5, 5.0, 5.5, 6.0, 6.5625, 8.5, 16.0, 2.625, 3.4375])
    parts = [576 * 576, 192 * 576, 192 * 576, 576 * 576, 1536 * 576, 1536 * 576, 576 * 1536]
    numbers = parts * blocks + [49152 * 576]
    items = []
    for count in numbers:
        scale = np.exp(generator.normal(-8, 2))
        costs = scale * 4.0**-bits * np.exp(generator.normal(0, 0.2, len(bits)))
        items.append(Item(tuple(int(count * b / 8) for b in bits), tuple(map(float, costs))))
    return items


def solver(items, budget):
    """The least cost by scipy's HiGHS, a branch-and-cut solver that knows nothing of this problem."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import block_diag, csr_array

    scale = max(max(one.costs) for one in items)
    costs = np.concatenate([one.costs for one in items]) / scale
    sizes = np.concatenate([one.sizes for one in items])
    one_each = csr_array(block_diag([np.ones((1, len(one.sizes))) for one in items]))
    rows = [LinearConstraint(one_each, 1, 1), LinearConstraint(sizes[None, :] / budget, 0, 1)]
    found = milp(
        costs, constraints=rows, integrality=np.ones_like(costs), bounds=Bounds(0, 1), options={"mip_rel_gap": 0}
    )
    assert found.success
    return found.fun * scale


@pytest.mark.parametrize("bits", [3.1, 4.0, 4.6, 5.9])
def test_a_model_is_solved_as_a_general_solver_solves_it(bits):
    items = model_like(8, seed=int(bits * 10))
    budget = int(sum(one.sizes[7] for one in items) * bits / 16)
    size, cost = totals(items, allocate(items, budget))
    assert size <= budget
    assert cost == pytest.approx(solver(items, budget), rel=1e-6)


def test_a_budget_for_everything_gives_the_least_cost_in_the_fewest_bytes():
    items = [Item((1, 2, 3), (3.0, 1.0, 1.0)), Item((5, 4), (0.0, 0.0))]
    assert allocate(items, 100) == (1, 1)


def test_too_small_a_budget_is_refused():
    with pytest.raises(ValueError, match="smallest choice takes 9, the budget is 8"):
        allocate([Item((4, 8), (1.0, 0.5)), Item((5,), (0.0,))], 8)


@pytest.mark.parametrize("sizes", [(), (1, 2)])
def test_an_item_is_checked(sizes):
    with pytest.raises(ValueError, match="options"):
        Item(sizes, (1.0,))


def test_every_point_of_the_frontier_is_an_optimum():
    items = model_like(2, seed=3)
    points = frontier(items)
    assert points[0][0] == sum(min(one.sizes) for one in items)
    assert points[-1][1] == pytest.approx(sum(min(one.costs) for one in items))
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(points))
    for size, cost in points[1:-1:9]:
        assert totals(items, allocate(items, size)) == (size, pytest.approx(cost, rel=1e-9))
