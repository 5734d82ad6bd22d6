"""prune.depth with heal = "blocks": what each block learns, against transformers' whole model, and that it resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import trial
from trial import Listener, made, note_of, random_corpus

from llmpack.calibration.blockwise import Blockwise, Fit
from llmpack.calibration.healing import healed
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.errors import NumericalError
from llmpack.models import open_model
from llmpack.models.forward import Forward

DROPPED = (1, 3)
KEPT = (0, 2, 4)


@pytest.fixture(scope="module")
def checkpoint(checkpoint_factory):
    return Checkpoint.open(checkpoint_factory(num_hidden_layers=5))


def corpus_of(count=48, seed=1):
    return random_corpus(seed, count, 48)


def step(**options):
    return made("prune.depth", **{"blocks": list(DROPPED), "damping": 0.1, "heal_rate": 1e-3, **options})


def states(folder, tokens):
    """Hidden states after every block of transformers' whole model, float64."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    seen = []
    for block in model.model.layers:
        block.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        model(tokens, use_cache=False)
    return seen


def relative_error(found, wanted):
    return float(((found - wanted).pow(2).sum(-1) / wanted.pow(2).sum(-1)).mean())


def test_every_block_leads_nearer_to_where_the_whole_model_was(checkpoint, tmp_path):
    """On text that nothing was learned from, and at the end the predictions are nearer too."""
    listener = Listener()
    result = trial.run(step(heal="blocks"), checkpoint, tmp_path / "blocks", corpus_of(), listener)
    note = note_of(result)
    assert set(note["gate"]) == {"none", "gaps", "every", "blocks"}
    assert note["healed"] == "blocks"
    assert note["gate"]["blocks"] < note["gate"]["every"]
    closed = trial.run(step(heal="every"), checkpoint, tmp_path / "every", corpus_of())
    tokens = corpus_of(8, seed=7).tokens
    whole = states(checkpoint.folder, tokens)
    wanted = [whole[1], whole[3], whole[4]]  # where the next block that is left begins
    ours, theirs = (states(one.folder, tokens) for one in (result, closed))
    for mine, other, goal in zip(ours, theirs, wanted, strict=True):
        assert relative_error(mine, goal) < relative_error(other, goal)
    said = [text for text in listener.said if "relative error" in text]
    assert [text.split(":")[0] for text in said] == [f"block {index}" for index in KEPT]


def test_before_the_first_step_it_is_the_closed_form(checkpoint, tmp_path):
    """Steps that move nothing leave each block where least squares put it, on streams that lie on disk."""
    forward = Forward(checkpoint, open_model(checkpoint))
    corpus = corpus_of()
    found = Blockwise(forward, corpus, KEPT, Fit(1, 1e-30, 0.1), tmp_path).run()
    expected = healed(forward, corpus.tokens, KEPT, damping=0.1, every=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not list(tmp_path.glob("activations-*"))


@pytest.mark.parametrize(("kept", "changed"), [((0, 1, 2, 4), (2, 4)), ((2, 3, 4), (2, 3, 4)), ((0, 1, 2), (2,))])
def test_blocks_before_the_one_before_the_first_gap_stay(kept, changed, checkpoint, tmp_path):
    forward = Forward(checkpoint, open_model(checkpoint))
    found = Blockwise(forward, corpus_of(8), kept, Fit(1, 1e-3, 0.1), tmp_path).run()
    assert {int(name.split(".")[2]) for name in found} == set(changed)


def test_a_rate_that_diverges_is_told(checkpoint, tmp_path):
    with pytest.raises(NumericalError, match=r"healing block 0: the loss of step \d+ is .*; lower heal_rate"):
        trial.run(step(heal="blocks", heal_rate=1e30), checkpoint, tmp_path, corpus_of(24))


KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
    from test_heal_blocks import corpus_of, step
    from trial import Listener, run
    from llmpack.checkpoint.checkpoint import Checkpoint

    class Deadly(Listener):
        def say(self, message):
            if message.startswith("block 2:"):
                os.kill(os.getpid(), signal.SIGKILL)

    run(step(heal="blocks"), Checkpoint.open(Path(sys.argv[2])), Path(sys.argv[3]), corpus_of(), Deadly())
"""


def test_a_killed_run_goes_on_at_its_block_and_gives_the_same_bytes(checkpoint, tmp_path):
    expected = trial.run(step(heal="blocks"), checkpoint, tmp_path / "whole", corpus_of())
    command = [sys.executable, "-c", textwrap.dedent(KILLED), Path(__file__).parent]
    command += [checkpoint.folder, tmp_path / "killed"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ)
    assert done.returncode == -signal.SIGKILL, done.stderr
    listener = Listener()
    again = trial.run(step(heal="blocks"), checkpoint, tmp_path / "killed", corpus_of(), listener)
    assert again.digest == expected.digest
    assert [text.split(":")[0] for text in listener.said if "relative error" in text] == ["block 2", "block 4"]
