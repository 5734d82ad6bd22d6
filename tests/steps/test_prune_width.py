"""prune.width on small models: what stays, what makes up for the rest, what is refused, and that it resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import trial
from family_zoo import CONFIGS
from trial import Listener, made, note_of, random_corpus

from llmpack.algorithms.divergence import kl_divergence
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.errors import RecipeError
from llmpack.models import family_of, open_model
from llmpack.progress import QUIET
from llmpack.steps.cutting import split


@pytest.fixture(scope="module")
def checkpoint(checkpoint_factory):
    """Feed-forward channels that overlap: less of them is needed than there are."""
    return Checkpoint.open(checkpoint_factory(num_hidden_layers=2, tokenizer=None))


@pytest.fixture(scope="module")
def graph(checkpoint):
    return open_model(checkpoint)


def corpus_of(seed=1, count=64, length=48):
    return random_corpus(seed, count, length)


def step(**options):
    return made("prune.width", **{"multiple_of": 32, **options})


def run(one, checkpoint, folder, corpus=None, progress=QUIET):
    return trial.run(one, checkpoint, folder, corpus or corpus_of(), progress)


def gate_of(result, won):
    note = note_of(result)
    assert note["healed"] == won
    return note["gate"]


def whole(folder, dtype=torch.float64):
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def divergence(one, other, tokens):
    with torch.no_grad():
        logits = [whole(each.folder)(tokens, use_cache=False).logits.flatten(0, 1) for each in (one, other)]
    return float(kl_divergence(*logits).mean())


@pytest.mark.parametrize(("option", "amount"), [("ffn", 0.25), ("heads", 1), ("hidden", 32)])
def test_compensation_is_nearer_to_the_source_on_text_it_has_not_seen(option, amount, checkpoint, tmp_path):
    one = step(**{option: amount}, damping=0.02, heal=False)
    listener = Listener()
    result = run(one, checkpoint, tmp_path / "with", corpus_of(count=160), listener)
    bare = run(one.model_copy(update={"compensate": False}), checkpoint, tmp_path / "without", corpus_of(count=160))
    gate = gate_of(result, "compensated")
    said = f"compensated: KL {gate['compensated']:.3g} (compensated) against {gate['none']:.3g} without"
    assert any(said in line for line in listener.said)
    tokens = corpus_of(seed=7, count=8).tokens
    assert divergence(checkpoint, result, tokens) < divergence(checkpoint, bare, tokens)


def test_the_first_block_is_least_squares_on_its_inputs(checkpoint, graph, tmp_path):
    """Against hooks on transformers' model in float64 and numpy's solver."""
    corpus = corpus_of()
    result = run(step(ffn=32, damping=0.05, heal=False), checkpoint, tmp_path, corpus)
    learn, _ = split(corpus, "x")
    model, seen = whole(checkpoint.folder), []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(learn.tokens, use_cache=False)
    a = seen[0].reshape(-1, 128).numpy()
    gate, W = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.down_proj.weight"
    rows = checkpoint.read(gate).tolist()
    stays = [rows.index(row) for row in result.read(gate).tolist()]
    assert stays == sorted(stays)
    assert len(stays) == 96
    penalty = np.sqrt(0.05 * np.mean(a[:, stays] ** 2, 0))
    inputs = np.vstack([a[:, stays] / np.sqrt(len(a)), np.diag(penalty)])
    old = checkpoint.read(W).double().numpy()
    wanted = np.vstack([a @ old.T / np.sqrt(len(a)), penalty[:, None] * old[:, stays].T])
    expected = np.linalg.lstsq(inputs, wanted, rcond=None)[0].T
    assert np.allclose(result.read(W).numpy(), expected, atol=2e-4)


@pytest.mark.parametrize("options", [{"ffn": 32}, {"heads": 1}, {"hidden": 32}, {"ffn": 32, "hidden": 32}])
def test_healing_is_least_squares_on_what_the_first_block_lacks(options, checkpoint, tmp_path):
    """Against hooks on transformers' models in float64 and numpy's solver."""
    corpus = corpus_of(count=200)
    asked = {**options, "damping": 0.05, "heal_damping": 0.2}
    narrow = run(step(**asked, heal=False), checkpoint, tmp_path / "narrow", corpus)
    result = run(step(**asked), checkpoint, tmp_path / "healed", corpus)
    assert {note_of(narrow)["healed"], note_of(result)["healed"]} == {"compensated", "healed"}
    learn, _ = split(corpus, "x")
    embedding = "model.embed_tokens.weight"
    columns = [tuple(column) for column in checkpoint.read(embedding).T.tolist()]
    stays = [columns.index(tuple(column)) for column in narrow.read(embedding).T.tolist()]
    seen = []
    model, wide = whole(narrow.folder), whole(checkpoint.folder)
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        own, wanted = (one(learn.tokens, output_hidden_states=True).hidden_states[1] for one in (model, wide))
    wanted = wanted[..., stays]
    weight = wanted.square().mean(-1, keepdim=True).rsqrt()
    missing, a = (((each * weight).flatten(0, 1)).numpy() for each in (wanted - own, seen[0]))
    inputs = np.vstack([a / np.sqrt(len(a)), np.sqrt(0.2 * np.mean(a**2)) * np.eye(a.shape[1])])
    lacks = np.vstack([missing / np.sqrt(len(a)), np.zeros((a.shape[1], len(stays)))])
    D = np.linalg.lstsq(inputs, lacks, rcond=None)[0]
    W = "model.layers.0.mlp.down_proj.weight"
    assert np.allclose(result.read(W).numpy(), narrow.read(W).numpy() + D.T, atol=2e-4)
    assert not np.allclose(D, 0, atol=1e-3)


def test_compensation_that_made_it_worse_is_not_kept(checkpoint, tmp_path):
    listener = Listener()
    one = step(ffn=32, damping=0.0, heal_damping=0.0)
    result = run(one, checkpoint, tmp_path, corpus_of(count=2, length=60), listener)
    gate = gate_of(result, "none")
    assert gate["none"] <= min(gate["compensated"], gate["healed"])
    assert any("kept the weights as they were" in said for said in listener.said)
    name = "model.layers.1.mlp.down_proj.weight"
    columns = {tuple(column) for column in checkpoint.read(name).T.tolist()}
    assert {tuple(column) for column in result.read(name).T.tolist()} <= columns


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family(name, checkpoint_factory, tmp_path):
    original = Checkpoint.open(checkpoint_factory(tokenizer=None, **CONFIGS[name]))
    options = {"ffn": 0.25}
    if family_of(original.config).own_head_dim:
        options |= {"heads": 1, "hidden": 32}
    result = run(step(**options, damping=0.05), original, tmp_path, corpus_of(count=24))
    left = whole(result.folder, torch.float32)
    with torch.no_grad():
        assert torch.isfinite(left(corpus_of(count=1).tokens, use_cache=False).logits).all()
    assert (
        family_of(result.config).sizes(result.config).head_dim
        == family_of(original.config).sizes(original.config).head_dim
    )


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "qwen3"])
def test_hidden_channels_that_hold_next_to_nothing_cost_next_to_nothing(name, checkpoint_factory, tmp_path):
    """The embedding's scale, norms before and after, tied and untied heads: all must follow."""
    from safetensors.torch import load_file, save_file

    made = checkpoint_factory(tokenizer=None, **CONFIGS[name] | {"torch_dtype": "float32"})
    folder = tmp_path / "faint"
    folder.mkdir()
    (folder / "config.json").write_text((made / "config.json").read_text())
    tensors = load_file(made / "model.safetensors")
    faint = torch.arange(0, 64, 2)
    for path, values in tensors.items():
        if path.endswith(("embed_tokens.weight", "lm_head.weight")):
            values[:, faint] *= 1e-3
        elif path.endswith(("o_proj.weight", "down_proj.weight")):
            values[faint] *= 1e-3
    save_file(tensors, folder / "model.safetensors")
    original = Checkpoint.open(folder)
    result = run(step(hidden=32), original, tmp_path, corpus_of(count=24))
    assert torch.equal(
        result.read("model.layers.0.mlp.down_proj.weight"), original.read("model.layers.0.mlp.down_proj.weight")[1::2]
    )
    assert divergence(original, result, corpus_of(seed=5, count=4).tokens) < 1e-3


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"ffn": 32}, (96, 2, 64)),
        ({"ffn": 0.3}, (96, 2, 64)),
        ({"ffn": 0.01}, (96, 2, 64)),
        ({"ffn": 0.99}, (32, 2, 64)),
        ({"heads": 1}, (128, 1, 64)),
        ({"heads": 0.5, "hidden": 32, "ffn": 64}, (64, 1, 32)),
        ({"ffn": "90K"}, (64, 2, 64)),
        ({"hidden": 32, "ffn": "42K"}, (64, 2, 32)),
    ],
)
def test_amounts(options, sizes, graph):
    left = family_of(graph.config).sizes(step(**options).preview(graph).config)
    assert (left.ffn, left.kv_heads, left.hidden) == sizes
    for amount in options.values():
        if isinstance(amount, str):
            assert step(**options).preview(graph).parameters <= int(amount[:-1]) * 1000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "say what goes"),
        ({"ffn": 20}, r"128 less 20 is 108, no multiple of 32; take 32 away|take 0 or 32 away"),
        ({"ffn": 128}, "128 less 128 is 0"),
        ({"heads": 2}, "2 less 2 is 0"),
        ({"hidden": 64}, "64 less 64 is 0"),
        ({"ffn": 0.25, "multiple_of": 256}, "128 ffn cannot get fewer and stay a multiple of 256"),
        ({"ffn": "1K"}, "even with 32 ffn left"),
        ({"ffn": "1B"}, "no more than 1B parameters already"),
        ({"ffn": "90K", "hidden": "80K"}, "cannot both get the model down"),
    ],
)
def test_what_cannot_be_is_refused_in_the_plan(options, said, graph):
    with pytest.raises(RecipeError, match=said):
        step(**options).preview(graph)


@pytest.mark.parametrize("amount", [0, -1, 1.5, "12", "12 MB"])
def test_amounts_that_mean_nothing_are_mistakes_of_the_recipe(amount):
    with pytest.raises(ValueError, match="ffn"):
        step(ffn=amount)


def test_families_with_heads_of_the_hidden_size_say_so(checkpoint_factory):
    for name, options in (("qwen2", {"heads": 1}), ("phi3", {"hidden": 32})):
        graph = open_model(Checkpoint.open(checkpoint_factory(tokenizer=None, **CONFIGS[name])))
        with pytest.raises(RecipeError, match="are not the hidden size"):
            step(**options).preview(graph)


KILLED = """
    import os, signal, sys
    from contextlib import contextmanager
    from pathlib import Path
    sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
    from test_prune_width import corpus_of, step
    from trial import bench
    from llmpack.checkpoint.checkpoint import Checkpoint
    from llmpack.models import open_model

    class Deadly:
        left = int(sys.argv[4])
        @contextmanager
        def task(self, title, total):
            Deadly.left -= title.startswith("block 1,")
            if Deadly.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            yield lambda done: None
        def say(self, message):
            pass

    checkpoint = Checkpoint.open(Path(sys.argv[2]))
    one = step(ffn=32, hidden=32)
    one.run(checkpoint, open_model(checkpoint), bench(Path(sys.argv[3]), checkpoint, corpus_of(), Deadly()))
"""


def test_a_killed_run_goes_on_and_gives_the_same_bytes(checkpoint, tmp_path):
    expected = run(step(ffn=32, hidden=32), checkpoint, tmp_path / "whole")
    killed = tmp_path / "killed"
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(KILLED),
        Path(__file__).parent,
        checkpoint.folder,
        killed,
        2,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert run(step(ffn=32, hidden=32), checkpoint, killed).digest == expected.digest
