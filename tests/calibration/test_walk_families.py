"""The walk on every family: masks, rotary embeddings and fused matrices of each block are those of the whole model."""

from __future__ import annotations

import pytest
import torch
from family_zoo import CONFIGS

from llmpack.calibration.corpus import Corpus
from llmpack.calibration.walk import walk
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.models import open_model


def whole_model_moments(folder, graph, tokens):
    """{name of a matrix: E[x x^T] of its inputs} of transformers' whole model in float64, with hooks."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    seen = {spec.name: [] for spec in graph.tensors if spec.is_linear}
    for name, inputs in seen.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(lambda _, given, inputs=inputs: inputs.append(given[0]))
    with torch.no_grad():
        model(tokens)
    rows = {name: torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]) for name, inputs in seen.items()}
    return {name: x.T @ x / len(x) for name, x in rows.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_matrix_sees_what_it_sees_in_the_whole_model(name, checkpoint_factory, tmp_path):
    checkpoint = Checkpoint.open(checkpoint_factory(tokenizer=None, **CONFIGS[name]))
    graph = open_model(checkpoint)
    corpus = Corpus.of(torch.randint(3, 512, (5, 40), generator=torch.Generator().manual_seed(3)))
    expected = whole_model_moments(checkpoint.folder, graph, corpus.tokens)
    for visit in walk(checkpoint, graph, corpus, work=tmp_path):
        sums = visit.hessians()
        for inputs, specs in graph.input_groups(visit.index).items():
            for spec in specs:
                theirs = expected.pop(spec.name)
                largest = float(theirs.diagonal().max())
                torch.testing.assert_close(sums[inputs].mean().double(), theirs, rtol=1e-3, atol=1e-4 * largest)
    assert expected == {}
