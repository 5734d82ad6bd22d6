"""Other ways to distill: text that the source writes, hidden states, less memory, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import trial
from trial import distill as step
from trial import random_corpus

from llmpack.calibration.self_text import PROMPT, self_written
from llmpack.calibration.student import Student, whole_model
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.errors import RecipeError
from llmpack.models import open_model


def corpus_of(count=16, length=24, seed=1):
    return random_corpus(seed, count, length)


def run(one, student, source, folder, corpus=None):
    return trial.run(one, student, folder, corpus or corpus_of(), source=source)


def test_what_the_source_writes_is_drawn_from_its_predictions(source, tmp_path):
    """It surprises the source as much as the source expects to be, which no other text does; a killed run goes on."""
    tokens = corpus_of(40, 32).tokens
    graph = open_model(source)
    written = self_written(source, graph, tokens, 3, tmp_path)
    assert written.shape == tokens.shape
    assert torch.equal(written[:, :PROMPT], tokens[:, :PROMPT])
    with torch.no_grad():
        logits = whole_model(source, graph)(written, use_cache=False).logits.double()
    log_p = torch.log_softmax(logits[:, PROMPT - 1 : -1], -1)
    paid = -log_p.gather(-1, written[:, PROMPT:, None])[..., 0]
    expected = -(log_p.exp() * log_p).sum(-1)
    spread = (paid - expected).std() / paid.numel() ** 0.5
    assert abs(float((paid - expected).mean())) < 4 * float(spread)
    files = sorted(tmp_path.iterdir())
    files[1].unlink()
    assert len(files) == 3
    assert torch.equal(self_written(source, graph, tokens, 3, tmp_path), written)


def test_it_learns_from_what_the_source_writes(source, student, tmp_path):
    result = run(step(data="self"), student, source, tmp_path)
    found = trial.note_of(result)["held_out"]
    assert found["after"] < found["before"]
    assert result.digest != student.digest


def test_hidden_states_are_led_to_those_of_the_source(source, student, tmp_path):
    tokens = corpus_of(4, seed=9).tokens

    def away(checkpoint):
        models = [whole_model(one, open_model(one)).base_model for one in (source, checkpoint)]
        with torch.no_grad():
            wanted, found = (model(tokens, use_cache=False).last_hidden_state.double() for model in models)
        return float(((found - wanted).pow(2).sum(-1) / wanted.pow(2).sum(-1)).mean())

    plain = away(run(step(), student, source, tmp_path / "plain"))
    led = away(run(step(hidden=5.0), student, source, tmp_path / "led"))
    assert led < plain < away(student)


def test_hidden_states_of_another_width_are_refused(source, checkpoint_factory, tmp_path):
    narrow = Checkpoint.open(checkpoint_factory(num_hidden_layers=1, hidden_size=32, head_dim=16, tokenizer=None))
    with pytest.raises(RecipeError, match="hidden states have 32 channels, the source's 64"):
        run(step(hidden=1.0), narrow, source, tmp_path)


def test_less_memory_gives_the_same_bytes(source, student, tmp_path):
    expected = run(step(), student, source, tmp_path / "kept")
    assert run(step(checkpointing=True), student, source, tmp_path / "again").digest == expected.digest
    learning = Student(student, open_model(student), "full", 1, torch.Generator())
    runs = []
    learning.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    learning.save_memory()
    learning.model(corpus_of(1).tokens, use_cache=False).logits.sum().backward()
    assert len(runs) == 2


def test_bfloat16_is_taken_where_the_hardware_has_it():
    has = torch.cpu.get_capabilities()
    fast = torch.cuda.is_available() or any(has.get(name) for name in ("avx512_bf16", "amx_tile", "amx_bf16", "bf16"))
    assert step(precision="auto")._schedule().precision == ("bfloat16" if fast else "float32")


TOGETHER = """
    import json, sys
    from pathlib import Path
    sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
    from llmpack.calibration import ranks
    from llmpack.calibration.training import follow
    if ranks.follows():
        follow()
    else:
        from test_distill_ways import run, step
        from llmpack.checkpoint.checkpoint import Checkpoint
        student, source = (Checkpoint.open(Path(path)) for path in sys.argv[2:4])
        result = run(step(batch=3), student, source, Path(sys.argv[4]))
        ranks.call(None)
        print(json.dumps([str(result.folder), ranks.count()]))
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_does(source, student, tmp_path):
    """`accelerate launch` starts both; sums of gradients differ in the last bits."""
    script = tmp_path / "together.py"
    script.write_text(textwrap.dedent(TOGETHER))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no", "--num_machines", "1"]
    command = [*launch, script, Path(__file__).parent, student.folder, source.folder, tmp_path / "two"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    folder, count = json.loads(done.stdout.splitlines()[-1])
    assert count == 2
    alone, together = run(step(batch=3), student, source, tmp_path / "one"), Checkpoint.open(Path(folder))
    for name in alone.tensors:
        torch.testing.assert_close(together.read(name), alone.read(name), rtol=1e-3, atol=1e-4)
        assert not torch.equal(alone.read(name), student.read(name))
