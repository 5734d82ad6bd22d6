"""A disk that fills up while a step runs: a clear error, finished blocks kept, the same bytes afterwards."""

import resource
from contextlib import contextmanager

import pytest
import torch

from llmpack.calibration.corpus import Corpus
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.errors import EnvironmentProblem
from llmpack.models import open_model
from llmpack.steps import STEPS
from llmpack.steps.step import Workbench

LARGEST = 64 << 10
"""Bytes that a file may have: more than a block in 4 bits takes, less than one in 16."""


@contextmanager
def small_files():
    """The system refuses to let a file grow beyond `LARGEST`, as it does on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_was_finished_before_the_disk_was_full_is_kept(checkpoint_factory, tmp_path):
    checkpoint = Checkpoint.open(checkpoint_factory(num_hidden_layers=3, tokenizer=None))
    graph = open_model(checkpoint)
    corpus = Corpus.of(torch.randint(0, 512, (4, 32), generator=torch.Generator().manual_seed(0)))
    wide = {f"{part}@2": "f16" for part in ("ffn.gate", "ffn.up", "ffn.down", "attention.q", "attention.o")}
    step = STEPS.load("quantize.gptq")(use="quantize.gptq", exceptions=wide)

    def run(folder):
        return step.run(checkpoint, graph, Workbench(folder / "made", folder / "work", checkpoint, corpus, 0, 1))

    with small_files(), pytest.raises(EnvironmentProblem, match="3 finished shards are kept") as caught:
        run(tmp_path / "full")
    assert "run the same command again" in str(caught.value)
    left = {path.name for path in (tmp_path / "full/made").iterdir()}
    assert {"outside.safetensors", "block-0000.safetensors", "block-0001.safetensors"} <= left
    assert not [name for name in left if name.endswith(".tmp") or "0002" in name]
    kept = (tmp_path / "full/made/block-0001.safetensors").stat().st_mtime_ns
    again = run(tmp_path / "full")
    assert (tmp_path / "full/made/block-0001.safetensors").stat().st_mtime_ns == kept
    assert again.digest == run(tmp_path / "clean").digest
