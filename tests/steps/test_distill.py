"""distill on a small model: what it learns, when it stops, what it keeps, and that it resumes to the same bytes."""

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
from trial import Listener, bench, random_corpus
from trial import distill as step

from llmpack.algorithms.divergence import kl_divergence
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.errors import InputRejected, NumericalError, StepFailed
from llmpack.models import open_model
from llmpack.progress import QUIET


def corpus_of(seed=1, count=32, length=32):
    return random_corpus(seed, count, length)


def run(one, student, source, folder, corpus=None, progress=QUIET):
    return trial.run(one, student, folder, corpus or corpus_of(), progress, source)


def logits(checkpoint, tokens):
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens, use_cache=False).logits.flatten(0, 1)


def divergence(source, other, tokens):
    return float(kl_divergence(logits(source, tokens), logits(other, tokens)).mean())


@pytest.mark.parametrize("train", ["full", "lora", "norms"])
def test_it_comes_nearer_to_the_source_on_text_it_has_not_seen(train, source, student, tmp_path):
    listener = Listener()
    rate = {"full": 3e-3, "lora": 1e-2, "norms": 1e-2}[train]
    result = run(step(train=train, learning_rate=rate), student, source, tmp_path, corpus_of(count=48), listener)
    tokens = corpus_of(seed=8, count=8).tokens
    assert divergence(source, result, tokens) < divergence(source, student, tokens)
    assert any("held-out KL" in said for said in listener.said)
    same = {n for n in student.tensors if (student.packed(n) == result.packed(n)).all()}
    parts = {spec.name: spec for spec in open_model(student).tensors}
    moved = {parts[name].part for name in parts.keys() - same}
    if train == "full":
        assert same == set()
    elif train == "lora":
        assert moved == {spec.part for spec in parts.values() if spec.is_linear}
    else:
        assert moved == {"norm"}


def test_what_did_not_help_is_not_kept(source, tmp_path):
    """The source itself cannot get nearer to itself."""
    listener = Listener()
    result = run(step(learning_rate=1e-2), source, source, tmp_path, corpus_of(), listener)
    assert result.digest == source.digest
    assert any("kept the weights as they were" in said for said in listener.said)


def test_it_stops_when_held_out_text_says_so(source, tmp_path):
    listener = Listener()
    one = step(learning_rate=1e-2, epochs=50, patience=2, check=1)
    run(one, source, source, tmp_path, corpus_of(count=8), listener)
    assert sum("held-out KL" in said for said in listener.said) == 2


def test_a_loss_that_is_not_finite_stops_and_leaves_everything_as_it_was(source, student, tmp_path):
    before = student.digest
    broken = step(learning_rate=1e30, check=1, warmup=1)
    with pytest.raises(NumericalError, match=r"lower learning_rate \(it is 1e\+30\)") as caught:
        run(broken, student, source, tmp_path, corpus_of(count=4, length=8))
    assert "untouched" in str(caught.value)
    assert Checkpoint.open(student.folder).digest == before


def test_a_teacher_with_another_vocabulary_is_refused(student, checkpoint_factory, tmp_path):
    other = Checkpoint.open(checkpoint_factory(vocab_size=600, tokenizer=None))
    with pytest.raises(InputRejected, match="a vocabulary of 512, its teacher one of 600"):
        run(step(), student, other, tmp_path)


def test_too_little_text_is_refused(source, student, tmp_path):
    with pytest.raises(StepFailed, match="calibration"):
        step().run(student, open_model(student), bench(tmp_path, source, None))
    with pytest.raises(StepFailed, match="one sequence cannot be split"):
        run(step(), student, source, tmp_path, corpus_of(count=1))


KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
    from test_distill import corpus_of, step
    from trial import bench
    from llmpack.checkpoint.checkpoint import Checkpoint
    from llmpack.models import open_model

    class Deadly:
        from contextlib import contextmanager
        @contextmanager
        def task(self, title, total):
            steps = 0
            def done(tokens):
                nonlocal steps
                steps += title == "distilling"
                if steps == 10:
                    os.kill(os.getpid(), signal.SIGKILL)
            yield done
        def say(self, message):
            pass

    student, source = (Checkpoint.open(Path(path)) for path in sys.argv[2:4])
    step().run(student, open_model(student), bench(Path(sys.argv[4]), source, corpus_of(), Deadly()))
"""


def test_a_killed_run_goes_on_and_gives_the_same_bytes(source, student, tmp_path):
    """Killed two steps after the last state that was saved."""
    expected = run(step(), student, source, tmp_path / "whole")
    command = [sys.executable, "-c", textwrap.dedent(KILLED), Path(__file__).parent]
    command += [student.folder, source.folder, tmp_path / "killed"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "killed" / "work" / "state.safetensors").exists()
    listener = Listener()
    assert run(step(), student, source, tmp_path / "killed", progress=listener).digest == expected.digest
    assert sum("of 14: held-out" in said for said in listener.said) == 2
