"""A build that prunes, heals, trains and quantizes: one recipe, one file that llama.cpp runs, and a record of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.errors import RecipeError, StepFailed
from llmpack.pipeline import contents
from llmpack.pipeline.build import build_bundle
from llmpack.pipeline.planning import plan_bundle

STEPS = """\
[[step]]
use = "prune.depth"
drop = 1
choice_tokens = 64

[[step]]
use = "prune.width"
ffn = 0.5
multiple_of = 64

[[step]]
use = "distill"
train = "norms"

"""


def test_prune_heal_train_and_quantize_in_one_recipe(order, recipe_file):
    recipe_file.write_text(recipe_file.read_text().replace("[[step]]\n", STEPS + "[[step]]\n", 1))
    planned = plan_bundle(order()).plan
    built = build_bundle(order())
    file = built.final / "model.gguf"
    assert file.stat().st_size == planned.nbytes
    gguf = GgufFile.open(file)
    assert (gguf.metadata["llama.block_count"], gguf.metadata["llama.feed_forward_length"]) == (1, 64)
    assert built.checked.tensors == len(gguf.tensors)
    made = json.loads((built.final / "manifest.json").read_text())["made"]
    depth, width, trained, _ = (step["found"] for step in made["steps"])
    assert len(depth["dropped"]) == 1
    assert depth["gate"][depth["healed"]] == min(depth["gate"].values())
    assert width["gate"][width["healed"]] == min(width["gate"].values())
    assert trained["held_out"]["after"] <= trained["held_out"]["before"]
    assert contents._card(built, built.observed).relation == "finetune"
    again = build_bundle(order())
    assert all(step.cached for step in again.steps)
    assert [dict(step.found) for step in again.steps] == [step["found"] for step in made["steps"]]
    is_compared_with_the_whole_model(built, order, recipe_file)


def is_compared_with_the_whole_model(built, order, recipe_file):
    """A model of random weights needs all of them: what half of it says has nothing to do with the source."""
    found = built.plan.alternative
    assert found.dominates
    assert found.finished
    assert found.words() in built.observed.notes
    assert built.observed.reports["alternative"] == found.document()
    assert plan_bundle(order()).plan.alternative == found
    whole = recipe_file.with_name("whole.toml")
    head, tail = recipe_file.read_text().split(STEPS)
    auto = f'[[step]]\nuse = "quantize.auto"\ntarget = "{found.nbytes} B"\n\n'
    whole.write_text(head + auto + tail.split("\n\n", 1)[1])
    (choice,) = plan_bundle(replace(order(), recipe=whole)).plan.choices
    assert choice.scored
    assert choice.predicted == found.predicted
    with pytest.raises(
        StepFailed, match=r"pruning is dominated: KL .* measured when finished, .* stops here"
    ) as caught:
        build_bundle(order("step.1.on_dominated=stop"))
    assert f'target = "{found.nbytes} B"' in str(caught.value)
    skipped = plan_bundle(order("step.0.on_dominated=skip", "step.1.on_dominated=skip")).plan
    assert skipped.alternative is None
    assert [step.key for step in skipped.steps] == [step.key for step in built.steps]
    before = plan_bundle(order("step.2.epochs=2")).plan.alternative
    assert (before.measured, before.dominates) == (None, False)
    assert "is measured by the build" in before.words()


def test_a_model_that_cannot_be_that_small_has_no_alternative(order, recipe_file):
    recipe_file.write_text(recipe_file.read_text().replace("[[step]]\n", STEPS + "[[step]]\n", 1))
    found = plan_bundle(order("step.3.embedding=mxfp4", "step.3.encoding=mxfp4")).plan.alternative
    assert found.smallest > found.nbytes
    assert f"the smallest mix of the whole model takes {found.smallest:,}" in found.words()


def test_stopping_needs_text_to_compare_on(order, recipe_file):
    plain = '[[step]]\nuse = "prune.depth"\nblocks = [1]\nheal = "none"\non_dominated = "stop"\n\n'
    head, tail = recipe_file.read_text().split("[[step]]\n")
    recipe_file.write_text(head.split("[calibration]")[0] + plain + tail.split("\n\n", 1)[1])
    with pytest.raises(RecipeError, match="compares on calibration text"):
        plan_bundle(order())
