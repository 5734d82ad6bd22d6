"""quantize.auto as a step: its options, its bounds, and the mix that it becomes."""

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from llmpack.calibration.corpus import Corpus
from llmpack.calibration.scores import scorable
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.encodings import encoding
from llmpack.errors import RecipeError, StepFailed
from llmpack.models import open_model
from llmpack.steps import STEPS
from llmpack.steps.quantize_auto import QuantizeAuto, QuantizeMix, Target
from llmpack.steps.quantize_gptq import QuantizeGptq
from llmpack.steps.step import Workbench


def auto(**options):
    return STEPS.load("quantize.auto").model_validate_json(json.dumps({"use": "quantize.auto", **options}))


@pytest.fixture(scope="module")
def checkpoint(checkpoint_factory):
    return Checkpoint.open(checkpoint_factory(tokenizer=None))


@pytest.fixture(scope="module")
def graph(checkpoint):
    return open_model(checkpoint)


def bench(folder, checkpoint):
    corpus = Corpus.of(torch.randint(0, 512, (12, 32), generator=torch.Generator().manual_seed(1)))
    return Workbench(folder / "content", folder / "work", checkpoint, corpus, 0, 1)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("3.9 bpw", Target("bits", 3.9)),
        ("4bpw", Target("bits", 4.0)),
        ("105 MB", Target("bytes", 105_000_000)),
        ("1.5 GiB", Target("bytes", 3 << 29)),
        ("budget", Target("budget")),
    ],
)
def test_targets_are_read(text, target):
    assert Target.parse(text) == target
    assert auto(target=text).target == text


@pytest.mark.parametrize("text", ["3.9", "bpw", "105", "2G", "-3 bpw", "all of it"])
def test_what_is_no_target_is_refused(text):
    with pytest.raises(ValidationError, match="a target is bits per weight"):
        auto(target=text)


def test_what_may_be_chosen(graph):
    spec = next(spec for spec in graph.tensors if spec.part == "ffn.up")
    norm = next(spec for spec in graph.tensors if spec.part == "norm")
    assert auto().allowed == scorable()
    assert "q4_k" not in auto().options_for(spec)
    assert auto(candidates=["q8_0", "q4_0"], forbid=["q4_0"]).options_for(spec) == ("q8_0",)
    assert auto().options_for(norm) == ()


def test_bounds_are_the_smallest_and_the_largest_graph(graph):
    low, high = auto(candidates=["q5_0", "q4_1", "q8_0"]).bounds(graph)
    assert {spec.encoding for spec in low.tensors if len(spec.shape) > 1} == {"q4_1"}
    assert {spec.encoding for spec in high.tensors if len(spec.shape) > 1} == {"q8_0"}
    assert auto(candidates=["q5_0", "q4_1", "q8_0"]).preview(graph) == high


def test_options_of_gptq_reach_the_mix_with_all_defaults_filled_in():
    mix = auto(gptq={"damping": 0.02}).chosen({"a": "q4_0"})
    whole = QuantizeGptq(use="quantize.gptq").model_dump(mode="json")
    assert mix.gptq == {**{k: whole[k] for k in mix.gptq}, "damping": 0.02}
    assert {"damping", "order", "on_failure"} <= set(mix.gptq)
    assert not {"use", "encoding", "embedding", "output", "exceptions"} & set(mix.gptq)
    assert mix.version == QuantizeGptq.version


def test_a_mix_rounds_each_tensor_as_quantize_gptq_does(checkpoint, graph, tmp_path):
    """Uniform mixes give the bytes of quantize.gptq; a mixed one gives what was asked for each tensor."""
    named = [spec for spec in graph.tensors if spec.is_linear or spec.part == "embedding"]
    uniform = auto().chosen({spec.name: "q5_0" if spec.is_linear else "q8_0" for spec in named})
    ours = uniform.run(checkpoint, graph, bench(tmp_path / "a", checkpoint))
    theirs = QuantizeGptq(use="quantize.gptq", encoding="q5_0").run(
        checkpoint, graph, bench(tmp_path / "b", checkpoint)
    )
    for spec in graph.tensors:
        assert np.array_equal(ours.packed(spec.name), theirs.packed(spec.name))
    names = ("q4_0", "iq4_nl", "q8_0", "f16")
    mix = auto().chosen({spec.name: names[at % 4] for at, spec in enumerate(named)})
    mixed = mix.run(checkpoint, graph, bench(tmp_path / "c", checkpoint))
    assert open_model(mixed).tensors == mix.preview(graph).tensors
    for at, spec in enumerate(named):
        assert mixed.tensors[spec.name].encoding == names[at % 4]
        error = (mixed.read(spec.name).float() - checkpoint.read(spec.name).float()).abs().max()
        assert error < 2 ** (3 - encoding(names[at % 4]).bits_per_weight)


def test_it_does_not_run_before_it_has_chosen(checkpoint, graph, tmp_path):
    with pytest.raises(StepFailed, match="before its encodings were chosen"):
        auto().run(checkpoint, graph, bench(tmp_path, checkpoint))


def test_a_mix_is_no_step_of_recipes():
    assert QuantizeMix not in [kind for _, kind in STEPS.items()]
    assert QuantizeAuto in [kind for _, kind in STEPS.items()]


def test_every_tensor_without_a_candidate_is_named(graph):
    with pytest.raises(RecipeError) as caught:
        auto(candidates=["q4_k", "q6_k"]).bounds(graph)
    linear = [spec for spec in graph.tensors if spec.is_linear and spec.shape[1] % 256]
    assert len(caught.value.problems) == len(linear) + 1
    assert "allow one of" in str(caught.value.problems[0])
