"""The walk against full transformers models with hooks, in float64."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from llmpack.calibration.corpus import Corpus
from llmpack.calibration.walk import resume_point, walk
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.errors import StepFailed
from llmpack.models import open_model

LINEAR_OF = {
    "attention.in": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.out": ["self_attn.o_proj"],
    "ffn.in": ["mlp.gate_proj", "mlp.up_proj"],
    "ffn.out": ["mlp.down_proj"],
}


@pytest.fixture(scope="module")
def checkpoint(checkpoint_factory):
    return Checkpoint.open(checkpoint_factory(num_hidden_layers=3, tokenizer=None))


@pytest.fixture(scope="module")
def graph(checkpoint):
    return open_model(checkpoint)


@pytest.fixture(scope="module")
def corpus():
    return Corpus.of(torch.randint(0, 512, (70, 48), generator=torch.Generator().manual_seed(3)))


def slow_hessians(folder, tokens, replaced=None):
    """{(block, linear): E[x x^T]} of the whole model in float64, with hooks."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    model.load_state_dict({k: v.double() for k, v in (replaced or {}).items()}, strict=False)
    seen = {}
    for index, layer in enumerate(model.model.layers):
        for name in (n for names in LINEAR_OF.values() for n in names):
            key = (index, name)
            seen[key] = []
            layer.get_submodule(name).register_forward_pre_hook(lambda _, x, key=key: seen[key].append(x[0]))
    with torch.no_grad():
        model(tokens)
    inputs = {key: torch.cat([x.reshape(-1, x.shape[-1]) for x in xs]) for key, xs in seen.items()}
    return {key: x.T @ x / len(x) for key, x in inputs.items()}


def close(mine, theirs):
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5 * float(theirs.diagonal().abs().max()))


def test_hessians_are_those_of_the_whole_model(checkpoint, graph, corpus, tmp_path):
    expected = slow_hessians(checkpoint.folder, corpus.tokens)
    visited = []
    for visit in walk(checkpoint, graph, corpus, work=tmp_path):
        sums = visit.hessians()
        assert list(sums) == list(LINEAR_OF)
        for inputs, names in LINEAR_OF.items():
            assert sums[inputs].tokens == corpus.tokens.numel()
            for name in names:
                close(sums[inputs].mean(), expected[visit.index, name])
        visited.append(visit.index)
    assert visited == [0, 1, 2]
    assert list(tmp_path.iterdir()) == []


def rough(W):
    """A change that later blocks must notice."""
    return torch.round(W * 8) / 8


def test_the_next_block_sees_what_the_replaced_weights_put_out(checkpoint, graph, corpus, tmp_path):
    replaced = {t.name: rough(checkpoint.read(t.name)) for t in graph.tensors if t.is_linear}
    expected = slow_hessians(checkpoint.folder, corpus.tokens, replaced)
    plain = slow_hessians(checkpoint.folder, corpus.tokens)
    for visit in walk(checkpoint, graph, corpus, work=tmp_path):
        before = visit.hessians(["attention.in"])["attention.in"].mean()
        close(before, expected[visit.index, "self_attn.q_proj"])
        if visit.index:
            assert (before.double() - plain[visit.index, "self_attn.q_proj"]).abs().max() > 1e-2
        for spec in visit.specs:
            if spec.is_linear:
                W = visit.weight(spec.name)
                assert torch.equal(W, checkpoint.read(spec.name))
                visit.replace(spec.name, rough(W))
                assert torch.equal(visit.weight(spec.name), rough(W))
        # within the block, later inputs see the replaced weights too
        close(visit.hessians(["ffn.out"])["ffn.out"].mean(), expected[visit.index, "mlp.down_proj"])


def test_observing_gives_the_same_hessians_in_one_pass(checkpoint, graph, corpus, tmp_path):
    twice = {v.index: v.hessians() for v in walk(checkpoint, graph, corpus, work=tmp_path / "a")}
    for visit in walk(checkpoint, graph, corpus, work=tmp_path / "b", observe=True):
        for _ in range(2):
            for inputs, total in visit.hessians().items():
                assert torch.equal(total.mean(), twice[visit.index][inputs].mean())
        with pytest.raises(ValueError, match="only observes"):
            visit.replace(visit.specs[1].name, visit.weight(visit.specs[1].name))


def test_a_visit_refuses_what_is_not_of_its_block(checkpoint, graph, corpus, tmp_path):
    steps = walk(checkpoint, graph, corpus, work=tmp_path)
    visit = next(steps)
    with pytest.raises(KeyError):
        visit.weight("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ValueError, match="its replacement"):
        visit.replace("model.layers.0.mlp.up_proj.weight", torch.zeros(3, 3))
    next(steps)
    with pytest.raises(ValueError, match="has left block 0"):
        visit.hessians()


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from llmpack.calibration.corpus import Corpus
from llmpack.calibration.walk import walk
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.models import open_model
checkpoint = Checkpoint.open(Path(sys.argv[1]))
graph = open_model(checkpoint)
corpus = Corpus.of(torch.load(sys.argv[3], weights_only=True))
for visit in walk(checkpoint, graph, corpus, work=Path(sys.argv[2])):
    if visit.index == int(sys.argv[4]):
        visit.hessians()
        os.kill(os.getpid(), signal.SIGKILL)
    for spec in visit.specs:
        if spec.is_linear:
            visit.replace(spec.name, torch.round(visit.weight(spec.name) * 8) / 8)
"""


def test_a_killed_walk_goes_on_with_the_same_bytes(checkpoint, graph, corpus, tmp_path):
    at = 1
    torch.save(corpus.tokens, tmp_path / "tokens.pt")
    work = tmp_path / "work"
    arguments = [checkpoint.folder, work, tmp_path / "tokens.pt", at]
    run = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], check=False)
    assert run.returncode == -9
    (work / f".activations-x.{os.getpid()}.tmp").write_bytes(b"half")
    start = resume_point(checkpoint, graph, corpus, work=work)
    assert start == at

    def bytes_at_each_block(folder, start):
        found = {}
        for visit in walk(checkpoint, graph, corpus, work=folder, start=start):
            (file,) = folder.glob("activations-*.f32")
            found[visit.index] = file.read_bytes()
            for spec in visit.specs:
                if spec.is_linear:
                    visit.replace(spec.name, rough(visit.weight(spec.name)))
        return found

    resumed = bytes_at_each_block(work, start)
    whole = bytes_at_each_block(tmp_path / "whole", 0)
    assert sorted(whole) == [0, 1, 2]
    assert resumed == {index: data for index, data in whole.items() if index >= at}
    assert list(work.iterdir()) == []


def test_activations_of_something_else_do_not_count(checkpoint, graph, corpus, tmp_path):
    steps = walk(checkpoint, graph, corpus, work=tmp_path)
    next(steps), next(steps)
    assert resume_point(checkpoint, graph, corpus, work=tmp_path) == 1
    other = Corpus.of(corpus.tokens.flip(0))
    assert resume_point(checkpoint, graph, other, work=tmp_path) == 0
    assert resume_point(checkpoint, graph, corpus, work=tmp_path, dtype=torch.bfloat16) == 0
    assert resume_point(checkpoint, graph, corpus, work=tmp_path / "nowhere") == 0
    with pytest.raises(StepFailed, match="does not hold the inputs of block 1"):
        next(walk(checkpoint, graph, other, work=tmp_path, start=1))
    (file,) = tmp_path.glob("activations-*.f32")
    with file.open("r+b") as cut:
        cut.truncate(100)
    assert resume_point(checkpoint, graph, corpus, work=tmp_path) == 0


def test_hooks_are_gone_after_a_pass_that_failed(checkpoint, graph, corpus, tmp_path):
    steps = walk(checkpoint, graph, corpus, work=tmp_path)
    visit = next(steps)
    (file,) = tmp_path.glob("activations-*.f32")
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(StepFailed, match="ends early"):
        visit.hessians()
    file.write_bytes(whole)
    assert visit.hessians()["ffn.out"].tokens == corpus.tokens.numel()
    assert not any(m._forward_pre_hooks for m in visit._module.modules())


def inputs_of(folder, tokens, replaced=None):
    """{(block, linear): [tokens, columns]} of the whole model in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    model.load_state_dict({k: v.double() for k, v in (replaced or {}).items()}, strict=False)
    seen = {}
    for index, layer in enumerate(model.model.layers):
        for name in (n for names in LINEAR_OF.values() for n in names):
            take = partial(seen.__setitem__, (index, name))
            layer.get_submodule(name).register_forward_pre_hook(lambda _, x, take=take: take(x[0]))
    with torch.no_grad():
        model(tokens)
    return {key: x.reshape(-1, x.shape[-1]) for key, x in seen.items()}


def halves(shape, *streams):
    """Of each stream the sequences of the fit, and every eighth, which is kept out of it."""
    kept = torch.arange(shape[0]) % 8 == 7
    cut = [one.reshape(*shape, -1) for one in streams]
    return [[one[which].flatten(0, 1) for one in cut] for which in (~kept, kept)]


def test_a_reference_gives_moments_between_what_is_seen_and_what_would_have_been(checkpoint, graph, corpus, tmp_path):
    linear = [t for t in graph.tensors if t.is_linear]
    plain = inputs_of(checkpoint.folder, corpus.tokens)
    for visit in walk(checkpoint, graph, corpus, work=tmp_path, reference=True):
        before = {t.name: rough(checkpoint.read(t.name)) for t in linear if t.block < visit.index}
        seen = inputs_of(checkpoint.folder, corpus.tokens, before)
        moments = visit.moments()
        assert list(moments) == list(LINEAR_OF)
        for inputs, (name, *_) in LINEAR_OF.items():
            x, r = seen[visit.index, name], plain[visit.index, name]
            fit, held = halves(corpus.tokens.shape, x, r)
            close(moments[inputs].own.mean(), fit[0].T @ fit[0] / len(fit[0]))
            close(moments[inputs].drift.moved(), (fit[1] - fit[0]).T @ fit[0] / len(fit[0]))
            moved, now = moments[inputs].drift.held()
            torch.testing.assert_close(moved.double(), held[1] - held[0], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(now.double(), held[0], rtol=1e-3, atol=1e-4)
            if visit.index:
                assert moments[inputs].drift.moved().abs().max() > 1e-3
        for spec in visit.specs:
            if spec.is_linear:
                visit.replace(spec.name, rough(visit.weight(spec.name)))
        with pytest.raises(ValueError, match="as it was"):
            visit.moments()
    assert list(tmp_path.iterdir()) == []


def test_moments_need_a_reference(checkpoint, graph, corpus, tmp_path):
    with pytest.raises(ValueError, match="a walk with one"):
        next(walk(checkpoint, graph, corpus, work=tmp_path)).moments()


def test_a_walk_with_a_reference_goes_on_where_it_was(checkpoint, graph, corpus, tmp_path):
    def crosses(folder, start, stop):
        found = {}
        for visit in walk(checkpoint, graph, corpus, work=folder, start=start, reference=True):
            found[visit.index] = {name: one.drift.moved() for name, one in visit.moments().items()}
            if visit.index == stop:
                break
            for spec in visit.specs:
                if spec.is_linear:
                    visit.replace(spec.name, rough(visit.weight(spec.name)))
        return found

    whole = crosses(tmp_path / "whole", 0, None)
    crosses(tmp_path / "cut", 0, 1)
    assert resume_point(checkpoint, graph, corpus, work=tmp_path / "cut") == 0
    start = resume_point(checkpoint, graph, corpus, work=tmp_path / "cut", reference=True)
    assert start == 1
    resumed = crosses(tmp_path / "cut", start, None)
    assert sorted(resumed) == [1, 2]
    for index, moments in resumed.items():
        for name, cross in moments.items():
            assert torch.equal(cross, whole[index][name])
    assert list((tmp_path / "cut").iterdir()) == []
