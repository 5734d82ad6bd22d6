"""[build] memory: what comes on top is refused by the system, what is held already by the check at the door."""

from __future__ import annotations

import resource

import numpy as np
import pytest
import torch

from llmpack.allocator import give_back_memory
from llmpack.errors import EnvironmentProblem
from llmpack.pipeline.memory_cap import capped_memory
from llmpack.runtime.meter import read_memory

MIB = 1024**2
MUCH = 512 * MIB
"""More than the allocators of the tests can have kept for reuse in one piece."""


@pytest.mark.parametrize(
    "allocate",
    [lambda: np.ones(MUCH, dtype=np.uint8), lambda: torch.ones(MUCH, dtype=torch.uint8)],
    ids=["numpy", "torch"],
)
def test_what_comes_on_top_is_refused_and_the_limit_is_lifted_again(allocate):
    before = resource.getrlimit(resource.RLIMIT_DATA)
    give_back_memory()
    limit = read_memory().resident + 64 * MIB
    with pytest.raises(EnvironmentProblem, match="Finished blocks are kept"), capped_memory(limit):
        allocate()
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert len(allocate()) == MUCH


def test_a_limit_under_what_is_held_already_is_refused_at_once():
    with pytest.raises(EnvironmentProblem, match="are held before it begins"), capped_memory(16 * MIB):
        pytest.fail("the block was entered")


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="another matter"), capped_memory(read_memory().resident + 2 * MUCH):
        raise RuntimeError("another matter")
