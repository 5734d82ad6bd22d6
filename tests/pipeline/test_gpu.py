"""`[build] processor`: what excludes a GPU, and what a plan says where there is none or too little of it."""

from types import SimpleNamespace

import pytest
import torch
from small_recipe import RECIPE

from llmpack.errors import EnvironmentProblem, RecipeError
from llmpack.pipeline import gpu
from llmpack.pipeline.cache import Cache
from llmpack.pipeline.keys import platform_class
from llmpack.pipeline.planning import plan_bundle
from llmpack.pipeline.recipe import validate
from llmpack.pipeline.state import Order
from llmpack.pipeline.toml_positions import parse_toml
from llmpack.steps.host_memory import BASE_PART, RUNNING, Moment, Part

ON_GPU = 'build.processor="cuda"'


def problems(*overrides):
    text = RECIPE.format(model="tiny")
    with pytest.raises(RecipeError) as caught:
        validate(parse_toml(text.encode(), "r.toml").with_overrides((ON_GPU, *overrides)))
    return [str(problem) for problem in caught.value.problems]


def recipe(*overrides):
    return validate(parse_toml(RECIPE.format(model="tiny").encode(), "r.toml").with_overrides(overrides))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("step.0.use=quantize.rtn", "step.0.importance=false"), "no step of this recipe runs text through the blocks"),
        (("step.0.use=quantize.gptq", "step.0.tune=10"), "set tune = 0"),
        (("step.0.use=quantize.gptq", 'step.0.products="bf16"'), "is about the processor; leave it out"),
        (('build.processor="rocm"',), "build.processor"),
    ],
)
def test_what_excludes_a_gpu_is_a_wrong_recipe(overrides, words):
    (problem,) = problems(*overrides)
    assert words in problem


def test_steps_that_read_text_block_by_block_may_ask_for_one():
    asked = recipe(ON_GPU)
    assert asked.build.processor == "cuda"
    assert [step.walks for step in asked.step] == [True]
    assert recipe().build.processor == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_by_the_plan(tmp_path, packable):
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE.format(model=packable))
    with pytest.raises(EnvironmentProblem, match=r"finds no GPU by CUDA; leave out build\.processor") as refused:
        plan_bundle(Order(path, tmp_path / "out", Cache(tmp_path / "cache"), (ON_GPU,)))
    assert refused.value.exit_code == 6


@pytest.fixture
def small_gpu(monkeypatch):
    """A GPU with 1000 bytes free, as far as the plan looks at it."""
    cuda = SimpleNamespace(mem_get_info=lambda _: (1000, 4000), get_device_name=lambda _: "small")
    found = SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="12.9"))
    monkeypatch.setattr(gpu, "torch_with_gpu", lambda _: found)


@pytest.mark.usefixtures("small_gpu")
def test_a_block_must_fit_the_gpu():
    def moments(nbytes):
        running = Moment(RUNNING, (Part(BASE_PART, 10**9), Part("weights of one block", nbytes)))
        return [running, Moment("rounding", (Part("matrices", 10**6),))]

    gpu.require_gpu("cuda", moments(1000))
    gpu.require_gpu("cpu", moments(1001))
    with pytest.raises(EnvironmentProblem, match=r"take 1001 B of the GPU, which has 1000 B free"):
        gpu.require_gpu("cuda", moments(1001))


@pytest.mark.usefixtures("small_gpu")
def test_the_gpu_is_part_of_what_bytes_depend_on():
    assert platform_class(2, "cuda") == {"gpu": {"name": "small", "cuda": "12.9"}, **platform_class(2)}
