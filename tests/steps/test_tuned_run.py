"""quantize.gptq with block tuning: what it writes and notes, and that it goes on after a stop."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from llmpack.calibration.corpus import Corpus
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.models import open_model
from llmpack.progress import QUIET
from llmpack.steps import STEPS
from llmpack.steps.blocks import noted
from llmpack.steps.step import Workbench

OPTIONS = {"encoding": "q4_0", "refine": 0, "tune": 6, "tune_rate": 0.002}


@pytest.fixture(scope="module")
def checkpoint(checkpoint_factory):
    return Checkpoint.open(checkpoint_factory(torch_dtype="bfloat16"))


def run(checkpoint, folder, progress=QUIET, **options):
    corpus = Corpus.of(torch.randint(0, 512, (64, 48), generator=torch.Generator().manual_seed(3)))
    one = STEPS.load("quantize.gptq").model_validate_json(json.dumps({"use": "quantize.gptq", **OPTIONS, **options}))
    bench = Workbench(folder / "content", folder / "work", checkpoint, corpus, 0, 1, progress)
    return one, one.run(checkpoint, open_model(checkpoint), bench)


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    return run(checkpoint, tmp_path_factory.mktemp("whole"))


def test_norms_get_room_and_blocks_their_notes(checkpoint, whole):
    one, result = whole
    assert open_model(result).tensors == one.preview(open_model(checkpoint)).tensors
    found = noted(result.folder, 2)["blocks"]
    assert found.keys() == {"0", "1"}
    for spec in open_model(result).tensors:
        before = checkpoint.read(spec.name).float()
        if spec.part == "norm" and spec.block is not None:
            assert spec.encoding == "f32"
            assert torch.equal(result.read(spec.name), before) != found[str(spec.block)]["tuning"]["kept"]
        elif spec.part == "norm":
            assert spec.encoding == "bf16"
    for note in found.values():
        errors = [note["tuning"][name] for name in ("tuned_output_error", "output_error")]
        assert note["tuning"]["kept"] == (errors[0] < errors[1])
    assert found["0"]["tuning"]["kept"]


def test_codes_are_those_of_rounding_alone(checkpoint, whole, tmp_path):
    _, tuned = whole
    _, plain = run(checkpoint, tmp_path, tune=0)
    assert noted(plain.folder, 2) == {}
    for spec in open_model(plain).block(0):
        if spec.is_linear:
            ours, theirs = (one.packed(spec.name).reshape(-1, 18) for one in (tuned, plain))
            assert np.array_equal(ours[:, 2:], theirs[:, 2:])
            assert not np.array_equal(ours[:, :2], theirs[:, :2])


def test_without_correction_blocks_are_tuned_all_the_same(checkpoint, tmp_path):
    _, result = run(checkpoint, tmp_path, correction=0.0)
    assert noted(result.folder, 2)["blocks"]["0"]["tuning"]["kept"]


class Stopping:
    """Progress that stops the run in the middle of tuning the last block."""

    @contextmanager
    def task(self, title, total):
        def done(_):
            if title == "block 1, tuning":
                raise KeyboardInterrupt

        yield done

    def say(self, message):
        pass


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(checkpoint, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path, Stopping())
    _, result = run(checkpoint, tmp_path)
    files = [{path.name: path.read_bytes() for path in one.folder.iterdir()} for one in (result, whole[1])]
    assert files[0] == files[1]
