"""Tuning a rounded block in the walk: what decides, and how the block runs afterwards."""

import pytest
import torch

from llmpack.calibration.corpus import Corpus
from llmpack.calibration.tuning import held_error, tune
from llmpack.calibration.walk import walk
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.encodings import encoding
from llmpack.models import open_model


@pytest.fixture(scope="module")
def checkpoint(tiny_llama):
    return Checkpoint.open(tiny_llama)


def corpus(seed=0, count=64):
    return Corpus.of(torch.randint(0, 512, (count, 48), generator=torch.Generator().manual_seed(seed)))


def rounded_visits(checkpoint, folder, text, name="q4_0"):
    """Every visit of a walk whose blocks are rounded to nearest, with what they were rounded to."""
    kind = encoding(name)
    visits = walk(checkpoint, open_model(checkpoint), text, work=folder, reference=True, outputs=True)
    for visit in visits:
        visit.moments(())
        rounded = {}
        for spec in visit.specs:
            if spec.is_linear:
                W = visit.weight(spec.name)
                rounded[spec.name] = kind.round(W, kind.fit(W))
                visit.replace(spec.name, rounded[spec.name].decode())
        yield visit, rounded


def test_the_output_of_every_block_comes_nearer_on_text_that_tuning_has_not_seen(checkpoint, tmp_path):
    unseen = rounded_visits(checkpoint, tmp_path / "unseen", corpus(seed=1, count=16))
    for (visit, rounded), (other, same) in zip(
        rounded_visits(checkpoint, tmp_path / "own", corpus()), unseen, strict=True
    ):
        plain = held_error(other)
        found = tune(visit, rounded, steps=24, rate=2e-3)
        assert found.kept
        assert found.after < 0.99 * found.before
        assert found.norms.keys() == {spec.name for spec in visit.specs if spec.part == "norm"}
        assert found.rounded.keys() == rounded.keys()
        for name, one in found.rounded.items():
            assert torch.equal(one.codes, rounded[name].codes)
            assert torch.equal(visit.weight(name), one.decode())
            other.replace(name, one.decode())
        for name, values in found.norms.items():
            assert torch.equal(visit.weight(name), values)
            other.replace(name, values)
        assert held_error(other) < plain
        for name, one in same.items():  # the next block sees the same in both walks
            visit.replace(name, one.decode())
            other.replace(name, one.decode())
        for name in found.norms:
            visit.replace(name, checkpoint.read(name))
            other.replace(name, checkpoint.read(name))


def test_what_held_out_text_does_not_bear_out_is_taken_back(checkpoint, tmp_path):
    visit, rounded = next(rounded_visits(checkpoint, tmp_path, corpus(count=16)))
    before = {spec.name: visit.weight(spec.name) for spec in visit.specs}
    found = tune(visit, rounded, steps=8, rate=0.1)
    assert not found.kept
    assert found.after > found.before > 0
    assert not found.rounded
    assert not found.norms
    assert held_error(visit) == found.before
    for name, values in before.items():
        assert torch.equal(visit.weight(name), values)


def test_without_sequences_to_decide_nothing_is_tuned(checkpoint, tmp_path):
    visit, rounded = next(rounded_visits(checkpoint, tmp_path, corpus(count=7)))
    found = tune(visit, rounded, steps=2, rate=1e-3)
    assert (found.before, found.after, found.kept) == (None, None, False)
    assert torch.equal(visit.weight(next(iter(rounded))), next(iter(rounded.values())).decode())


def test_outputs_are_there_only_where_the_walk_keeps_them(checkpoint, tmp_path):
    for visit in walk(checkpoint, open_model(checkpoint), corpus(count=8), work=tmp_path, reference=True):
        with pytest.raises(ValueError, match="unchanged"):
            next(visit.pairs())
        break
