"""Passes that nobody reads the outputs of end at the last input that is watched."""

import pytest
import torch

from llmpack.algorithms.hessian import HessianSum
from llmpack.calibration.corpus import Corpus
from llmpack.calibration.walk import walk
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.models import open_model
from llmpack.profile import profiling


@pytest.fixture(scope="module")
def checkpoint(checkpoint_factory):
    return Checkpoint.open(checkpoint_factory(num_hidden_layers=2, tokenizer=None))


def test_what_nobody_reads_is_not_computed(checkpoint, tmp_path):
    graph = open_model(checkpoint)
    corpus = Corpus.of(torch.randint(0, 512, (70, 48), generator=torch.Generator().manual_seed(3)))
    visit = next(walk(checkpoint, graph, corpus, work=tmp_path))
    with profiling() as profile:
        first = visit.hessians(["attention.in"])["attention.in"].mean()
        every = visit.hessians()["attention.in"].mean()
    assert torch.equal(first, every)
    tokens = corpus.tokens.numel()
    assert profile.phases["forward"].tokens == 2 * tokens
    # the first pass ends before any linear map, the second before the last one
    run = sum(spec.parameters for spec in visit.specs if spec.is_linear and spec.inputs != "ffn.out")
    assert profile.phases["forward"].flops == 2.0 * tokens * run


def test_a_sum_whose_mean_was_taken_takes_no_more():
    total = HessianSum(3)
    total.add(torch.ones(2, 3))
    assert torch.equal(total.mean(), torch.ones(3, 3))
    assert total.mean() is total.mean()
    with pytest.raises(ValueError, match="taken already"):
        total.add(torch.ones(1, 3))
