"""prune.depth on a small model: what it chooses, what it writes, when it refuses, and that it resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import trial
from trial import Listener, bench, made, note_of, random_corpus

from llmpack.algorithms.divergence import kl_divergence
from llmpack.calibration.ablation import without_each
from llmpack.calibration.choice import by_angle, by_influence, cheapest_run, runs_of
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.errors import RecipeError, StepFailed
from llmpack.models import open_model
from llmpack.models.forward import Forward, final_hidden
from llmpack.progress import QUIET
from llmpack.steps.cutting import split

BLOCKS = 5


@pytest.fixture(scope="module")
def checkpoint(checkpoint_factory):
    return Checkpoint.open(checkpoint_factory(num_hidden_layers=BLOCKS))


@pytest.fixture(scope="module")
def graph(checkpoint):
    return open_model(checkpoint)


def corpus_of(seed=1, count=24, length=48):
    return random_corpus(seed, count, length)


def step(**options):
    return made("prune.depth", **options)


def run(one, checkpoint, folder, corpus=None, progress=QUIET):
    return trial.run(one, checkpoint, folder, corpus or corpus_of(), progress)


def hidden_without(checkpoint, dropped, tokens):
    """Last hidden states of transformers' whole model without some blocks, float64."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float64).eval()
    model.model.layers = torch.nn.ModuleList([b for i, b in enumerate(model.model.layers) if i not in dropped])
    model.config.num_hidden_layers = len(model.model.layers)
    with torch.no_grad():
        hidden = model.model(tokens, use_cache=False).last_hidden_state
        return hidden, model.lm_head(hidden)


def test_leaving_out_in_one_pass_is_leaving_out_one_by_one(checkpoint, graph):
    tokens = corpus_of(count=3).tokens
    found = without_each(Forward(checkpoint, graph), tokens, [0, 2, 3, 4], [(), (0,), (2, 3), (4,)])
    assert list(found) == [(), (0,), (2, 3), (4,)]
    for dropped, hidden in found.items():
        expected, _ = hidden_without(checkpoint, {1, *dropped}, tokens)
        torch.testing.assert_close(hidden.double(), expected, rtol=0, atol=1e-4)


def test_a_greedy_round_takes_the_block_whose_loss_costs_least(checkpoint, graph):
    tokens = corpus_of(count=2).tokens
    forward = Forward(checkpoint, graph)
    _, logits = hidden_without(checkpoint, (), tokens)
    costs = {}
    for index in (0, 1, 3, 4):
        _, changed = hidden_without(checkpoint, {2, index}, tokens)
        costs[index] = float(kl_divergence(logits.flatten(0, 1), changed.flatten(0, 1)).mean())
    best = min(costs, key=costs.__getitem__)
    run_, kl = cheapest_run(forward, (forward, final_hidden(checkpoint, graph, tokens)), tokens, [2], 1)
    assert run_ == (best,)
    assert kl == pytest.approx(costs[best], abs=1e-3)


def test_scores_by_hidden_states_choose_what_turns_them_least(checkpoint, graph):
    tokens = corpus_of(count=3).tokens
    forward = Forward(checkpoint, graph)
    states, _ = zip(*(hidden_without_norm(checkpoint, depth, tokens) for depth in range(BLOCKS + 1)), strict=True)
    cosine = torch.nn.functional.cosine_similarity
    influence = [1 - float(cosine(states[i], states[i + 1], dim=-1).mean()) for i in range(BLOCKS)]
    assert by_influence(forward, tokens, 2, 1) == sorted(sorted(range(BLOCKS), key=influence.__getitem__)[:2])
    angle = [
        float(torch.arccos(cosine(states[i][:, -1], states[i + 2][:, -1], dim=-1)).mean()) for i in range(BLOCKS - 1)
    ]
    start = min(range(BLOCKS - 1), key=angle.__getitem__)
    assert by_angle(forward, tokens, 2) == [start, start + 1]


def hidden_without_norm(checkpoint, depth, tokens):
    """Hidden states after so many blocks, float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float64).eval()
    model.model.norm = torch.nn.Identity()
    model.model.layers = model.model.layers[:depth]
    model.config.num_hidden_layers = depth
    with torch.no_grad():
        return model.model(tokens, use_cache=False).last_hidden_state, None


def test_named_blocks_go_and_nothing_else_changes(checkpoint, graph, tmp_path):
    result = run(step(blocks=[1, 3], heal="none"), checkpoint, tmp_path, corpus=None)
    assert note_of(result) == {"dropped": [1, 3]}
    for new, old in enumerate((0, 2, 4)):
        for spec in graph.block(old):
            name = spec.name.replace(f"layers.{old}.", f"layers.{new}.")
            assert (result.packed(name) == checkpoint.packed(spec.name)).all()
    assert not step(blocks=[1], heal="none").needs_corpus


def test_the_best_way_to_heal_is_taken(checkpoint, tmp_path):
    note = note_of(run(step(blocks=[1]), checkpoint, tmp_path, corpus_of(count=40)))
    assert set(note["gate"]) == {"none", "gaps", "every"}
    assert note["gate"][note["healed"]] == min(note["gate"].values())


@pytest.mark.parametrize("heal", ["every", "gaps"])
def test_healing_brings_the_model_nearer_to_the_source_on_text_it_has_not_seen(heal, checkpoint, graph, tmp_path):
    listener = Listener()
    corpus = corpus_of(count=160)
    result = run(step(blocks=[1, 3], heal=heal, damping=0.1), checkpoint, tmp_path, corpus, listener)
    gate = note_of(result)["gate"]
    assert note_of(result)["healed"] == heal
    assert gate[heal] < gate["none"]
    tokens = corpus_of(seed=9, count=8).tokens
    _, logits = hidden_without(checkpoint, (), tokens)
    kl = [
        float(kl_divergence(logits.flatten(0, 1), changed.flatten(0, 1)).mean())
        for changed in (hidden_without(checkpoint, {1, 3}, tokens)[1], hidden_without(result, (), tokens)[1])
    ]
    assert kl[1] < kl[0]
    assert any("healed: KL" in said for said in listener.said)
    changed = {
        spec.name
        for new, old in enumerate((0, 2, 4))
        for spec in graph.block(old)
        if (result.packed(spec.name.replace(f".{old}.", f".{new}.")) != checkpoint.packed(spec.name)).any()
    }
    blocks = {"every": (0, 2, 4), "gaps": (0, 2)}[heal]
    assert changed == {f"model.layers.{index}.mlp.down_proj.weight" for index in blocks}


def test_healing_that_made_it_worse_is_not_kept(checkpoint, tmp_path):
    """Far fewer tokens than the matrix has columns, and no damping: the fit is perfect, and of no use elsewhere."""
    listener = Listener()
    one = step(blocks=[2], damping=0.0)
    result = run(one, checkpoint, tmp_path, corpus_of(count=3, length=24), listener)
    gate = note_of(result)["gate"]
    assert note_of(result)["healed"] == "none"
    said = next(text for text in listener.said if "kept the un-healed weights" in text)
    assert all(f"{kl:.3g}" in said for kl in gate.values())
    plain = run(step(blocks=[2], heal="none"), checkpoint, tmp_path / "plain")
    assert result.digest == plain.digest


def test_what_is_held_out_is_not_learned_from():
    corpus = corpus_of(count=24)
    learn, held = split(corpus, "prune.depth")
    assert (len(learn.tokens), len(held.tokens)) == (21, 3)
    assert learn.overlap(held) == 0


@pytest.mark.parametrize(
    ("drop", "left"), [(2, 3), (0.2, 4), (0.5, 3), ("150K", 3), ("0.15M", 3), ("1K", None), ("1B", None)]
)
def test_amounts(drop, left, graph):
    one = step(drop=drop)
    if left is None:
        with pytest.raises(RecipeError):
            one.preview(graph)
        return
    assert one.preview(graph).block_count == left
    if isinstance(drop, str):
        assert one.preview(graph).parameters <= 150_000
        each = sum(spec.parameters for spec in graph.block(0))
        assert one.preview(graph).parameters + each > 150_000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "one of the two"),
        ({"drop": 1, "blocks": [1]}, "one of the two"),
        ({"drop": BLOCKS}, "5 of 5 blocks would go"),
        ({"blocks": [1, 1]}, "block 1 is named more than once"),
        ({"blocks": [1, 7]}, "block 7 does not exist; the model has blocks 0-4"),
        ({"blocks": []}, "no block is named"),
        ({"blocks": [0, 1, 2, 3, 4]}, "leave at least one"),
        ({"drop": "1K"}, "lie outside them"),
        ({"drop": "1B"}, "parameters already"),
    ],
)
def test_what_cannot_be_is_refused_in_the_plan(options, said, graph):
    with pytest.raises(RecipeError, match=said):
        step(**options).preview(graph)


def test_patterns_of_windows(checkpoint_factory, tmp_path):
    from family_zoo import CONFIGS

    settings = {**CONFIGS["gemma2"], "num_hidden_layers": 6}
    gemma = Checkpoint.open(checkpoint_factory(tokenizer=None, **settings))
    graph = open_model(gemma)
    with pytest.raises(RecipeError, match="must fall by a multiple of that, not by 1"):
        step(drop=1).preview(graph)
    with pytest.raises(RecipeError, match="no longer repeat every 2 blocks"):
        step(blocks=[1]).preview(graph)
    assert step(drop=0.1).preview(graph).block_count == 4
    result = run(step(drop=2, choice_tokens=96, damping=0.1), gemma, tmp_path, corpus_of(count=40))
    first, second = note_of(result)["dropped"]
    assert second == first + 1
    assert result.config["num_hidden_layers"] == 4


def test_codes_are_not_pruned(checkpoint, graph, tmp_path):
    quantize = made("quantize.rtn", importance=False)
    with pytest.raises(RecipeError, match="prune first and quantize after it"):
        step(drop=1).preview(quantize.preview(graph))


def test_without_text_or_with_too_little(checkpoint, graph, tmp_path):
    one = step(drop=1)
    with pytest.raises(StepFailed, match="calibration"):
        one.run(checkpoint, graph, bench(tmp_path, checkpoint, None))
    with pytest.raises(StepFailed, match="one sequence cannot be split"):
        one.run(checkpoint, graph, bench(tmp_path, checkpoint, corpus_of(count=1)))


def test_runs_of_neighbours():
    assert runs_of([0, 2, 3], 2) == [(0, 2), (2, 3)]


KILLED = """
    import json, os, signal, sys
    from pathlib import Path
    sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
    from test_prune_depth import corpus_of, step
    from trial import bench
    from llmpack.checkpoint.checkpoint import Checkpoint
    from llmpack.models import open_model

    class Deadly:
        from llmpack.progress import QUIET
        task = staticmethod(QUIET.task)
        def say(self, message):
            if sys.argv[4] in message:
                os.kill(os.getpid(), signal.SIGKILL)

    checkpoint = Checkpoint.open(Path(sys.argv[2]))
    step(drop=2).run(checkpoint, open_model(checkpoint), bench(Path(sys.argv[3]), checkpoint, corpus_of(), Deadly()))
"""


@pytest.mark.parametrize("moment", ["go"])
def test_a_killed_run_goes_on_and_gives_the_same_bytes(moment, checkpoint, tmp_path):
    expected = run(step(drop=2), checkpoint, tmp_path / "whole")
    tests = Path(__file__).parent
    command = [sys.executable, "-c", textwrap.dedent(KILLED), tests, checkpoint.folder, tmp_path / "killed", moment]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(json.loads((tmp_path / "killed" / "work" / "choice.json").read_text())) == 2
    listener = Listener()
    again = run(step(drop=2), checkpoint, tmp_path / "killed", progress=listener)
    assert again.digest == expected.digest
    assert not [said for said in listener.said if "without block" in said]
