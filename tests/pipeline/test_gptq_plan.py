"""Recipes for GPTQ folders: what a plan promises, and what it refuses with which exit code."""

import importlib.util

import pytest
import torch
from small_recipe import RECIPE

from llmpack.errors import EnvironmentProblem, MissingExtra, RecipeError
from llmpack.pipeline.cache import Cache
from llmpack.pipeline.planning import plan_bundle
from llmpack.pipeline.state import Order

BUNDLE = '[bundle]\nformat = "safetensors"\nlayout = "gptq"\n\n[evaluation]'


@pytest.fixture
def order(tmp_path, packable):
    def made(encoding, *overrides, embedding="f16"):
        path = tmp_path / "tiny.toml"
        text = RECIPE.format(model=packable).replace('encoding = "iq4_nl"', f'encoding = "{encoding}"', 1)
        text = text.replace(f'encoding = "{encoding}"', f'encoding = "{encoding}"\nembedding = "{embedding}"', 1)
        path.write_text(text.replace("[evaluation]", BUNDLE).replace('disk = "8 MB"', 'disk = "20 MB"'))
        return Order(path, tmp_path / "out", Cache(tmp_path / "cache"), overrides)

    return made


@pytest.fixture
def loaders(monkeypatch):
    """As if GPTQModel and optimum were installed; a plan imports neither."""
    find = importlib.util.find_spec
    there = {"gptqmodel": "json", "optimum": "json"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: find(there.get(name, name)))


@pytest.mark.usefixtures("loaders")
def test_the_plan_says_what_the_folder_will_weigh(order):
    planned = plan_bundle(order("int4_g32")).plan
    sizes = planned.file_format.totals(planned.graph)
    count, nbytes = sizes["int4_g32"]
    assert count == 14
    inside = [spec for spec in planned.graph.tensors if spec.is_linear]
    words = sum(spec.parameters // 2 for spec in inside)
    groups = sum(spec.parameters // 32 for spec in inside)
    assert nbytes == words + groups * 2 + groups // 2 + sum(4 * spec.shape[1] for spec in inside)


@pytest.mark.usefixtures("loaders")
@pytest.mark.parametrize(
    ("encoding", "options", "words"),
    [
        ("int4_g48", {}, "unknown encoding `int4_g48`"),
        ("int5_g32", {}, "unknown encoding `int5_g32`"),
        ("int4_g128", {}, "rows of 64 are not a multiple of int4_g128's block of 128"),
        ("int4_g32", {"embedding": "q8_0"}, "it holds int groups and floats, not q8_0"),
        ("iq4_nl", {}, "not iq4_nl; set encoding"),
    ],
)
def test_what_the_layout_lacks_is_a_wrong_recipe(order, encoding, options, words):
    with pytest.raises(RecipeError) as refused:
        plan_bundle(order(encoding, **options))
    assert refused.value.exit_code == 3
    assert words in str(refused.value)


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is not None, reason="GPTQModel is installed")
def test_a_missing_loader_is_told_at_plan_time(order):
    with pytest.raises(MissingExtra, match=r"pip install 'llmpack\[gptq\]'") as refused:
        plan_bundle(order("int4_g32"))
    assert refused.value.exit_code == 6


@pytest.mark.parametrize(("encoding", "planned"), [("int4_g32", "q4_0"), ("int4_g32_asym", "q4_1"), ("int3_g32", None)])
def test_a_gguf_of_int_groups_holds_their_codes_or_is_refused(order, encoding, planned):
    asked = order(encoding, "bundle.format=gguf")
    text = asked.recipe.read_text().replace('layout = "gptq"\n', "")
    asked.recipe.write_text(text)
    if planned is None:
        with pytest.raises(RecipeError, match="a second quantization"):
            plan_bundle(asked)
    else:
        graph = plan_bundle(asked).plan.graph
        assert {spec.encoding for spec in graph.tensors if spec.is_linear} == {planned}


def test_a_second_quantization_is_planned_where_it_is_asked_for_and_told(order):
    asked = order("int3_g32", "bundle.format=gguf")
    text = asked.recipe.read_text().replace('layout = "gptq"\n', "")
    again = '[[step]]\nuse = "quantize.rtn"\nencoding = "q4_0"\nembedding = "f16"\n'
    asked.recipe.write_text(text.replace("[bundle]", f"{again}\n[bundle]"))
    with pytest.raises(RecipeError, match="set requantize = true"):
        plan_bundle(asked)
    asked.recipe.write_text(text.replace("[bundle]", f"{again}requantize = true\n\n[bundle]"))
    planned = plan_bundle(asked).plan
    assert {spec.encoding for spec in planned.graph.tensors if spec.is_linear} == {"q4_0"}
    (words,) = planned.twice
    assert words == "quantize.rtn: a second quantization of 14 matrices, int3_g32 to q4_0"
    assert planned.document()["second_quantizations"] == [words]


def test_a_gpu_is_for_folders_and_has_to_be_there(order):
    asked = order("int4_g32", 'runtime.processor="cuda"', "bundle.format=gguf")
    text = asked.recipe.read_text()
    asked.recipe.write_text(text.replace('layout = "gptq"\n', ""))
    with pytest.raises(RecipeError, match="is for safetensors folders"):
        plan_bundle(asked)


@pytest.mark.usefixtures("loaders")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_by_the_plan(order):
    with pytest.raises(EnvironmentProblem, match="finds no GPU by CUDA"):
        plan_bundle(order("int4_g32", 'runtime.processor="cuda"'))
