"""Pruned checkpoints as GGUF files: llama.cpp's logits are those of transformers, and everything reads back."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from family_files import F16, LENGTH, LIMIT, SETTINGS, error_of, reference, tokens_of

from llmpack.calibration.corpus import Corpus
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.formats.facts import Facts
from llmpack.formats.readback import read_back
from llmpack.models import open_model
from llmpack.steps import STEPS
from llmpack.steps.step import Workbench

pytestmark = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")

DEPTH = {"use": "prune.depth", "drop": 1, "choice_tokens": 64, "damping": 0.1}
WIDTH = {"use": "prune.width", "ffn": 0.25, "multiple_of": 32}


def pruned(folder, tmp_path, *options):
    checkpoint = source = Checkpoint.open(folder)
    corpus = Corpus.of(torch.randint(3, 500, (12, 32), generator=torch.Generator().manual_seed(1)))
    for number, one in enumerate(options):
        step = STEPS.load(one["use"]).model_validate_json(json.dumps(one))
        bench = Workbench(tmp_path / f"{number}", tmp_path / f"work-{number}", source, corpus, 0, 1)
        checkpoint = step.run(checkpoint, open_model(checkpoint), bench)
    return checkpoint


@pytest.mark.parametrize(
    ("name", "changes", "heads"),
    [
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 2}, {"heads": 1, "hidden": 32}),
        ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 2}, {"heads": 1, "hidden": 32}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}, {"heads": 2}),
        ("qwen3", {"tie_word_embeddings": False}, {"heads": 1, "hidden": 32}),
        ("phi3", {}, {}),
        ("gemma3", {}, {"heads": 1, "hidden": 32}),
    ],
)
def test_llama_cpp_computes_what_transformers_does(name, changes, heads, make_family, runtime, tmp_path):
    depth = DEPTH | ({"drop": 6} if name == "gemma3" else {})
    checkpoint = pruned(make_family(name, **changes), tmp_path, depth, WIDTH | heads)
    graph = open_model(checkpoint)
    path = tmp_path / "model.gguf"
    facts = Facts("tiny")
    F16.write(checkpoint, graph, path, facts)
    tokens = tokens_of(LENGTH)
    assert error_of(runtime, path, reference(checkpoint.folder, tokens)) < LIMIT
    assert read_back(path, checkpoint, graph, F16, facts, SETTINGS).tensors == len(graph.tensors)
