"""A model of three blocks and what is left of it without one; files of tests may have a `source` of their own."""

from __future__ import annotations

import pytest
import trial

from llmpack.checkpoint.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def source(checkpoint_factory):
    return Checkpoint.open(checkpoint_factory(num_hidden_layers=3, tokenizer=None))


@pytest.fixture(scope="module")
def student(source, tmp_path_factory):
    """The source without a block."""
    one = trial.made("prune.depth", blocks=[1], heal="none")
    return trial.run(one, source, tmp_path_factory.mktemp("student"), None)
