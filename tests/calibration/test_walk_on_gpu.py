"""Blocks on another device than the rounding: nothing is computed from tensors of both, and results are the same."""

import pytest
import torch
from family_zoo import CONFIGS

from llmpack.calibration.corpus import Corpus
from llmpack.calibration.walk import walk
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.models import open_model
from llmpack.steps.prune_width import PruneWidth
from llmpack.steps.quantize_gptq import QuantizeGptq
from llmpack.steps.quantize_rtn import QuantizeRtn
from llmpack.steps.step import Workbench
from tests.far_device import NAME, FarDevice


def corpus():
    return Corpus.of(torch.randint(3, 500, (9, 40), generator=torch.Generator().manual_seed(3)))


def sums_of(one):
    """All matrices that were summed."""
    if hasattr(one, "own"):
        return [one.own.mean(), one.drift.moved(), *one.drift.held()]
    return [one.mean()]


def walked(folder, work, device, reference):
    checkpoint = Checkpoint.open(folder)
    found = []
    for visit in walk(checkpoint, open_model(checkpoint), corpus(), work=work, device=device, reference=reference):
        gathered = visit.moments() if reference else visit.hessians()
        for name, one in gathered.items():
            found += [(visit.index, name, matrix.clone()) for matrix in sums_of(one)]
        for spec in visit.specs:
            if spec.is_linear:
                visit.replace(spec.name, visit.weight(spec.name).mul(8).round().div(8))
    return found


@pytest.mark.parametrize(("family", "reference"), [*((name, False) for name in CONFIGS), ("llama", True)])
def test_a_walk_on_another_device_sums_the_same(checkpoint_factory, tmp_path, family, reference):
    folder = checkpoint_factory(tokenizer=None, **CONFIGS[family])
    expected = walked(folder, tmp_path / "here", "cpu", reference)
    with FarDevice() as device:
        found = walked(folder, tmp_path / "there", NAME, reference)
    assert device.operations > 100
    assert [one[:2] for one in found] == [one[:2] for one in expected]
    for (*_, mine), (*_, theirs) in zip(found, expected, strict=True):
        assert mine.device.type == "cpu"
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


STEPS = [
    QuantizeGptq(use="quantize.gptq", encoding="q4_0", products="f32"),
    QuantizeRtn(use="quantize.rtn", encoding="q4_0"),
    PruneWidth(use="prune.width", ffn=32, hidden=32, multiple_of=32),
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.use)
def test_a_step_whose_blocks_run_on_another_device_makes_the_same(checkpoint_factory, tmp_path, step):
    source = Checkpoint.open(checkpoint_factory(num_hidden_layers=2, tokenizer=None))
    graph = open_model(source)

    def run(name, processor):
        bench = Workbench(tmp_path / name, tmp_path / f"{name}-work", source, corpus(), 0, 1, processor=processor)
        return step.run(source, graph, bench)

    here = run("here", "cpu")
    with FarDevice() as device:
        there = run("there", NAME)
    assert device.operations > 100
    assert list(there.tensors) == list(here.tensors)
    same = [there.read(name).flatten() == here.read(name).flatten() for name in here.tensors]
    close = [torch.isclose(there.read(n), here.read(n), rtol=1e-3, atol=1e-3).flatten() for n in here.tensors]
    assert float(torch.cat(close).float().mean()) > 0.995
    assert float(torch.cat(same).float().mean()) > 0.3
