"""Amounts given as "budget": the least that makes the finished model fit, as every number tried one by one says."""

import math

import pytest

from llmpack.errors import RecipeError
from llmpack.pipeline.planning import plan_bundle

WIDTH = '[[step]]\nuse = "prune.width"\nffn = "budget"\nmultiple_of = 32\n\n'
DEPTH = '[[step]]\nuse = "prune.depth"\ndrop = "budget"\n\n'
FFN = (32, 64, 96)
"""What can go of the 128 channels of the small model."""


@pytest.fixture
def plan(order, recipe_file):
    """Plans of the small model with a step before its quantization."""
    text = recipe_file.read_text()

    def make(step, *overrides):
        recipe_file.write_text(text.replace("[[step]]\n", step + "[[step]]\n", 1))
        return plan_bundle(order(*overrides)).plan

    return make


@pytest.mark.parametrize("limit", ["disk", "memory"])
def test_as_little_goes_as_the_limit_wants(limit, plan):
    def taken(gone):
        found = plan(WIDTH, f"step.0.ffn={gone}")
        return found.disk if limit == "disk" else math.ceil(found.estimate.memory.total.high)

    sizes = {gone: taken(gone) for gone in FFN}
    assert sizes[32] > sizes[64] > sizes[96]
    for bound in (sizes[64], sizes[64] + 1, sizes[96]):
        found = plan(WIDTH, f"budget.{limit}={bound} B")
        expected = next(gone for gone in FFN if sizes[gone] <= bound)
        assert found.steps[0].step.ffn == expected
        assert not found.misses
    with pytest.raises(RecipeError, match=rf"budget.{limit}.*ffn gone that may go.* are taken; raise it"):
        plan(WIDTH, f"budget.{limit}={sizes[96] - 1} B")


def test_whole_blocks_go_and_the_plan_is_that_of_the_number(plan):
    one = plan(DEPTH, "step.0.drop=1")
    found = plan(DEPTH, f"budget.disk={one.disk} B")
    assert found.steps == one.steps
    assert found.graph == one.graph


@pytest.mark.parametrize(
    ("step", "overrides", "said"),
    [
        (WIDTH, ["budget.disk=1 GB", "budget.memory=10 GiB"], "the model keeps every limit"),
        (DEPTH + WIDTH, [], r"prune.width \(ffn\) fills what there is as well"),
        (WIDTH, ["step.0.heads=budget"], r"prune.width \(ffn\) fills what there is"),
        (DEPTH + '[[step]]\nuse = "quantize.auto"\ntarget = "3 MB"\n\n', [], r'quantize.auto \(target = "3 MB"\)'),
    ],
)
def test_what_has_no_answer_is_refused_where_it_stands(step, overrides, said, plan):
    with pytest.raises(RecipeError, match=said) as caught:
        plan(step, *overrides)
    assert caught.value.problems[0].path in ("step.0.ffn", "step.0.drop", "step.0.heads")


def test_a_budget_without_limits_says_so(recipe_file, order):
    text = recipe_file.read_text().replace('memory = "600 MiB"\ndisk = "8 MB"\n', "")
    recipe_file.write_text(text.replace("[[step]]\n", DEPTH + "[[step]]\n", 1))
    with pytest.raises(RecipeError, match="set disk, memory or decode there"):
        plan_bundle(order())
