"""Every family rounded to 4 bits, written and run: what steps store, the writer permutes and llama.cpp computes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from family_files import LENGTH, error_of, tokens_of, write
from family_zoo import CONFIGS

from llmpack.calibration.corpus import Corpus
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.models import open_model
from llmpack.models.forward import Forward, final_hidden
from llmpack.steps import STEPS
from llmpack.steps.step import Workbench

RUNTIME_LIMIT = 0.08
"""Relative error of logits to those of the decoded weights: llama.cpp rounds activations to 8 bits, which costs 0.015
to 0.04 here; rows in a wrong order cost more than 0.5."""


def rounded(checkpoint, name, folder):
    step = STEPS.load(name).model_validate_json(json.dumps({"use": name, "encoding": "iq4_nl", "embedding": "q8_0"}))
    graph = open_model(checkpoint)
    corpus = Corpus.of(torch.randint(3, 600, (16, 64), generator=torch.Generator().manual_seed(4)))
    result = step.run(checkpoint, graph, Workbench(folder / "out", folder / "work", checkpoint, corpus, 0, 1))
    assert open_model(result).tensors == step.preview(graph).tensors
    return result


def logits(checkpoint):
    graph = open_model(checkpoint)
    hidden = final_hidden(checkpoint, graph, torch.tensor([tokens_of(LENGTH)]))
    return Forward(checkpoint, graph).logits(hidden)[0].numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_rounded_model_runs_in_llama_cpp_as_its_decoded_weights_do(make_family, runtime, tmp_path, name):
    source = Checkpoint.open(make_family(name, tokenizer="phi" if name.startswith("phi") else "spm"))
    exact, errors = logits(source), {}
    for step in ("quantize.rtn", "quantize.gptq"):
        result = rounded(source, step, tmp_path / step)
        decoded = logits(result)
        errors[step] = float(np.linalg.norm(decoded - exact) / np.linalg.norm(exact))
        assert error_of(runtime, write(result.folder, tmp_path / f"{step}.gguf"), decoded) < RUNTIME_LIMIT
    assert errors["quantize.gptq"] < errors["quantize.rtn"]
