"""prune.depth with heal = "blocks": what blocks learn, against transformers' whole model, and that it resumes."""

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
from transformers import AutoModelForCausalLM
from transformers.utils import logging
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


def test_blocks_lead_nearer_to_where_the_whole_model_was(checkpoint, tmp_path):
    """On text that nothing was learned from: over all blocks, after the last one, and in what is predicted."""
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
    mine, other = ([relative_error(*pair) for pair in zip(one, wanted, strict=True)] for one in (ours, theirs))
    assert sum(mine) < sum(other)
    assert mine[-1] < other[-1]
    assert windows(listener) == ["blocks 0, 2", "blocks 2, 4", "block 4"]


def windows(listener):
    return [text.split(":")[0] for text in listener.said if "relative error" in text]


@pytest.mark.parametrize(
    ("rate", "window", "count"),
    [(1e-30, 1, 24), (1e-30, 3, 24), (0.3, 2, 24), (1e-3, 2, 1)],
    ids=["none is moved", "together", "it gets worse", "nothing can judge"],
)
def test_what_sequences_kept_out_do_not_bear_out_stays_the_closed_form(rate, window, count, checkpoint, tmp_path):
    """Each block is then where least squares put it, on streams that lie on disk, of which nothing is left."""
    forward = Forward(checkpoint, open_model(checkpoint))
    corpus, listener = corpus_of(count), Listener()
    found = Blockwise(forward, corpus, KEPT, Fit(1, rate, 0.1, window), tmp_path, listener).run()
    expected = healed(forward, taught(corpus), KEPT, damping=0.1, every=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert all("kept as it was" in text or "cannot be split" in text for text in listener.said)
    assert {path.name.split("-")[0] for path in tmp_path.iterdir()} == {"healed"}


def taught(corpus):
    return corpus.tokens[: len(corpus.tokens) - len(corpus.tokens) // 8]


def slow_window(folder, start, corpus, goals, passes, rate):
    """Blocks 0 and 2 fitted together, in float64 on transformers' own blocks, Adam written out; the numbers of block 0.

    start  numbers of both blocks to begin with, by name
    goals  how much the differences after each of the two count
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval().requires_grad_(False)
    tokens = taught(corpus)
    whole = states(folder, tokens)
    with torch.no_grad():
        given = model.model.embed_tokens(tokens)
        for name, values in start.items():
            model.get_parameter(name).copy_(values)
    places = torch.arange(tokens.shape[1])[None]
    blocks = [model.model.layers[index].requires_grad_() for index in (0, 2)]
    numbers = {name: value for name, value in model.named_parameters() if value.requires_grad}
    first, second = ({name: torch.zeros_like(value) for name, value in numbers.items()} for _ in range(2))
    each = 512 // tokens.shape[1]
    steps = [slice(at, at + each) for at in range(0, len(tokens), each)] * passes
    for count, step in enumerate(steps, 1):
        hidden, loss = given[step], 0.0
        for block, goal, share in zip(blocks, (whole[1][step], whole[3][step]), goals, strict=True):
            angles = model.model.rotary_emb(hidden, places)
            hidden = block(hidden, attention_mask=None, position_ids=places, position_embeddings=angles)
            loss = loss + share * ((goal - hidden).pow(2).sum(-1) / goal.pow(2).sum(-1)).mean()
        loss.backward()
        size = rate * (1 - 0.9 * (count - 1) / len(steps))
        with torch.no_grad():
            for name, value in numbers.items():
                first[name] = 0.9 * first[name] + 0.1 * value.grad
                second[name] = 0.999 * second[name] + 0.001 * value.grad**2
                m, v = first[name] / (1 - 0.9**count), second[name] / (1 - 0.999**count)
                value -= size * m / (v.sqrt() + 1e-8)
                value.grad = None
    return {name: value.detach() for name, value in numbers.items() if ".layers.0." in name}


def test_a_window_learns_as_a_slow_twin_does(checkpoint, tmp_path):
    forward = Forward(checkpoint, open_model(checkpoint))
    corpus = corpus_of(48)
    closed = healed(forward, taught(corpus), KEPT, damping=0.1, every=True)
    both = [spec.name for index in (0, 2) for spec in forward.graph.block(index)]
    start = {name: closed[name] if name in closed else checkpoint.read(name) for name in both}
    found = Blockwise(forward, corpus, KEPT, Fit(2, 1e-3, 0.1, 2), tmp_path).run()

    def distance(goals):
        twin = slow_window(checkpoint.folder, start, corpus, goals, passes=2, rate=1e-3)
        apart = sum(float((found[name] - twin[name]).pow(2).sum()) for name in twin)
        return (apart / sum(float((twin[name] - start[name]).pow(2).sum()) for name in twin)) ** 0.5

    assert distance((0.5, 0.5)) < 0.01
    assert distance((0.0, 1.0)) > 0.1
    assert distance((1.0, 0.0)) > 0.1


@pytest.mark.parametrize(("kept", "changed"), [((0, 1, 2, 4), (2, 4)), ((2, 3, 4), (2, 3, 4)), ((0, 1, 2), (2,))])
def test_blocks_before_the_one_before_the_first_gap_stay(kept, changed, checkpoint, tmp_path):
    forward = Forward(checkpoint, open_model(checkpoint))
    found = Blockwise(forward, corpus_of(8), kept, Fit(1, 1e-3, 0.1, 2), tmp_path).run()
    assert {int(name.split(".")[2]) for name in found} == set(changed)


def test_a_rate_that_diverges_is_told(checkpoint, tmp_path):
    with pytest.raises(NumericalError, match=r"healing blocks 0, 2: the loss of step \d+ is .*; lower heal_rate"):
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
            if message.startswith(sys.argv[4]):
                os.kill(os.getpid(), signal.SIGKILL)

    run(step(heal="blocks", heal_window=3), Checkpoint.open(Path(sys.argv[2])), Path(sys.argv[3]), corpus_of(),
        Deadly())
"""


def test_a_killed_run_goes_on_at_its_window_and_gives_the_same_bytes(checkpoint, tmp_path):
    """What neighbours had learned in the window before is there again."""
    one = step(heal="blocks", heal_window=3)
    expected = trial.run(one, checkpoint, tmp_path / "whole", corpus_of())
    command = [sys.executable, "-c", textwrap.dedent(KILLED), Path(__file__).parent]
    command += [checkpoint.folder, tmp_path / "killed", "blocks 2, 4:"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ)
    assert done.returncode == -signal.SIGKILL, done.stderr
    listener = Listener()
    again = trial.run(one, checkpoint, tmp_path / "killed", corpus_of(), listener)
    assert again.digest == expected.digest
    assert windows(listener) == ["blocks 2, 4", "block 4"]
