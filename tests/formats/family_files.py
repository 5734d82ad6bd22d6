"""What the tests of families share: files, tokens, and how far llama.cpp's logits are from transformers'."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.formats.facts import Facts
from llmpack.formats.gguf import GgufFormat
from llmpack.models import open_model
from llmpack.runtime.llama import LlamaRuntime
from llmpack.runtime.settings import RuntimeSettings

F16 = GgufFormat("f16")
SETTINGS = RuntimeSettings(threads=1)
LENGTH = 96
LIMIT = 1e-2
"""Relative error of logits, as norms over all positions and tokens."""


def write(folder: Path, path: Path) -> Path:
    checkpoint = Checkpoint.open(folder)
    graph = open_model(checkpoint)
    facts = Facts.of_folder(folder, folder.name, graph.parameters)
    F16.write(checkpoint, graph, path, facts)
    assert path.stat().st_size == F16.nbytes(graph, checkpoint, facts)
    return path


def tokens_of(length: int) -> list[int]:
    return np.random.default_rng(5).integers(3, 600, length).tolist()


def reference(folder: Path, tokens: list[int]) -> np.ndarray:
    """Logits of transformers' whole model in float32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def error_of(runtime: LlamaRuntime, path: Path, expected: np.ndarray, context: int = 256) -> float:
    """How far llama.cpp's logits are from the expected ones, relative to these."""
    runtime.open(path, SETTINGS, context)
    return float(np.linalg.norm(runtime.logits(tokens_of(len(expected))) - expected) / np.linalg.norm(expected))
