"""What pruning and distillation are said to take of memory: more where more is held, from shapes alone."""

from __future__ import annotations

import json

import pytest
from tiny_config import TINY

from llmpack.models import family_of
from llmpack.steps import STEPS
from llmpack.steps.host_memory import BASE, Batch
from llmpack.steps.pruning_memory import learning_blocks

GRAPH = family_of(TINY).graph(dict(TINY) | {"num_hidden_layers": 6})
BATCH = Batch.of(32_768, 512)


def needed(use, **options):
    step = STEPS.load(use).model_validate_json(json.dumps({"use": use, **options}))
    return max(moment.nbytes for moment in step.host_memory(GRAPH, BATCH))


def test_a_greedy_choice_holds_a_stream_for_every_block():
    few, many = (needed("prune.depth", drop=1, choice_tokens=tokens, heal="none") for tokens in (512, 5120))
    assert many - few == pytest.approx(4 * 7 * (5120 - 512) * 64)
    assert needed("prune.depth", drop=1) >= BASE + 4 * 2 * 32_768 * 64


def test_blocks_that_are_named_and_not_healed_hold_nothing():
    step = STEPS.load("prune.depth").model_validate({"use": "prune.depth", "blocks": (1,), "heal": "none"})
    assert step.host_memory(GRAPH, None) == ()


def test_blocks_that_learn_together_are_held_together():
    """With their gradients, the optimizer's two moments and their numbers before; no more blocks than there are."""
    block = sum(spec.parameters for spec in GRAPH.block(0))
    each = 4 * 5 * block + 4 * 512 * (8 * 64 + 4 * 128)
    assert [learning_blocks(GRAPH, BATCH, count).nbytes - BASE for count in (1, 3, 64)] == [each, 3 * each, 6 * each]
    step = STEPS.load("prune.depth").model_validate({"use": "prune.depth", "drop": 1, "heal": "blocks"})
    assert step.host_memory(GRAPH, BATCH)[-1] == learning_blocks(GRAPH, BATCH, step.heal_window)


def test_width_holds_the_second_moments_of_what_is_narrowed():
    ffn = needed("prune.width", ffn=0.25, multiple_of=32, heal=False)
    assert ffn > needed("prune.width", heads=1, heal=False)
    assert needed("prune.width", ffn=0.25, multiple_of=32) - ffn == 4 * 2 * 32_768 * 64  # two streams of hidden states


def test_training_holds_the_model_and_three_numbers_for_each_that_learns():
    full, thin, norms = (needed("distill", train=train) for train in ("full", "lora", "norms"))
    assert full > thin > norms > BASE + 4 * GRAPH.parameters
    few = sum(spec.parameters for spec in GRAPH.tensors if spec.part == "norm")
    assert full - norms == 12 * (GRAPH.parameters - few)
