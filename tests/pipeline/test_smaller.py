"""A build that prunes, heals, trains and quantizes: one recipe, one file that llama.cpp runs, and a record of it."""

from __future__ import annotations

import json

from llmpack.checkpoint.gguf_file import GgufFile
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
    assert width["gate"][width["gate"]["kept"]] == min(width["gate"][way] for way in ("before", "after"))
    assert trained["held_out"]["after"] <= trained["held_out"]["before"]
    assert contents._card(built, built.observed).relation == "finetune"
    again = build_bundle(order())
    assert all(step.cached for step in again.steps)
    assert [dict(step.found) for step in again.steps] == [step["found"] for step in made["steps"]]
