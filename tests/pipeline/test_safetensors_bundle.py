"""The whole road to a safetensors bundle, and what the commands make of one."""

import json
import shutil

import pytest
import torch
import transformers
from small_recipe import RECIPE, SHORT

from llmpack.digest import sha256_file
from llmpack.errors import MissingExtra, RecipeError, VerificationFailed
from llmpack.formats.bundle import Bundle
from llmpack.pipeline.build import build_bundle
from llmpack.pipeline.cache import Cache
from llmpack.pipeline.check import Question, check
from llmpack.pipeline.evaluate import evaluate_bundle
from llmpack.pipeline.inspection import inspect
from llmpack.pipeline.planning import plan_bundle
from llmpack.pipeline.state import Order
from llmpack.pipeline.talk import Question as Prompt
from llmpack.pipeline.talk import ask
from llmpack.pipeline.verify import verify_bundle

pytestmark = pytest.mark.xdist_group("safetensors-bundle")

STEP = '[[step]]\nuse = "quantize.gptq"\nencoding = "iq4_nl"\n\n'
BUNDLE = '[bundle]\nformat = "safetensors"\nlayout = "bnb-nf4"\nfloat = "bf16"\nshard = "4 MB"\n\n[evaluation]'


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, packable):
    path = tmp_path_factory.mktemp("safetensors") / "tiny.toml"
    text = RECIPE.format(model=packable).replace(STEP, "").replace("[evaluation]", BUNDLE)
    path.write_text(text.replace('memory = "600 MiB"', 'memory = "4 GiB"').replace('disk = "8 MB"', 'disk = "20 MB"'))
    return path


def order_of(recipe, *overrides):
    return Order(recipe, recipe.parent / "out", Cache(recipe.parent / "cache"), overrides, protocol=SHORT)


@pytest.fixture(scope="module")
def built(recipe):
    pytest.importorskip("bitsandbytes")
    return build_bundle(order_of(recipe))


def test_a_build_is_what_the_plan_said_and_passes(built):
    bundle = Bundle.open(built.final)
    assert built.verdict.passes
    assert {row.limit: row.status for row in built.verdict.rows}["memory"] == "PASS"
    assert (
        built.artifact.nbytes
        == built.plan.nbytes
        == sum((built.final / f).stat().st_size for f in built.artifact.sizes)
    )
    assert bundle.model == built.final
    assert built.summary()["model"]["file"] == "config.json"
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json", "LICENSE"} <= bundle.digests.keys()
    made = bundle.manifest["made"]["artifact"]
    assert made["files"] == {name: sha256_file(built.final / name) for name in built.artifact.sizes}
    assert made["encodings"]["nf4"]["tensors"] == 14
    assert built.reports["fidelity"]["mean"] < 0.01
    assert "from_pretrained" in (built.final / "README.md").read_text()


def test_transformers_loads_the_bundle_as_it_is(built):
    model = transformers.AutoModelForCausalLM.from_pretrained(built.final)
    tokenizer = transformers.AutoTokenizer.from_pretrained(built.final)
    assert model.is_loaded_in_4bit
    with torch.no_grad():
        assert bool(torch.isfinite(model(**tokenizer("Hello", return_tensors="pt")).logits).all())


def test_the_commands_take_it(built):
    folder, cache = built.final, built.cache
    assert verify_bundle(folder)["bundle"] == str(folder)
    found = inspect(folder)
    assert found.kind == "bundle"
    assert found.parameters == built.plan.graph.parameters
    assert found.bits_per_weight == pytest.approx(built.plan.bits_per_weight)
    assert set(found.by_encoding()) == {"bf16", "bitsandbytes"}
    checked = check(folder, cache, Question())
    assert checked.passed
    assert not checked.measured
    with pytest.raises(RecipeError, match=r"runtime\.kv: kv is a setting of llama\.cpp"):
        check(folder, cache, Question(changes=["runtime.kv=q8_0"]))
    report = evaluate_bundle(folder, cache).report
    assert report["mean"] == built.reports["quality"]["mean"]
    answer = ask(folder, Prompt("Hello", tokens=4, raw=True), lambda text: None)
    assert 0 < answer["tokens"] <= 4


def test_a_changed_weight_is_found(built, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(built.final, folder)
    shard = min(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(VerificationFailed, match="was changed"):
        verify_bundle(folder)
    with pytest.raises(VerificationFailed, match="not the model that the manifest describes"):
        check(folder, built.cache, Question())


@pytest.mark.parametrize(
    ("changes", "path", "words"),
    [
        (["bundle.layout=bnb-nf5"], "bundle.layout", "did you mean `bnb-nf4`"),
        (["bundle.format=gguf"], "bundle.layout", 'layout belongs to format = "safetensors"'),
        (["bundle.layout=plain", "bundle.double_quant=false"], "bundle.double_quant", "has no option double_quant"),
        (["runtime.kv=q8_0"], "runtime.kv", "kv is a setting of llama.cpp"),
        (['bundle.keep=["attention.w"]'], "bundle.keep", "no part `attention.w`"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_at_plan_time(recipe, changes, path, words):
    with pytest.raises(RecipeError) as refused:
        plan_bundle(order_of(recipe, *changes))
    assert path in [problem.path for problem in refused.value.problems]
    assert words in str(refused.value)


def test_codes_of_gguf_are_refused_at_plan_time(recipe, tmp_path):
    coded = tmp_path / "coded.toml"
    coded.write_text(recipe.read_text().replace("[bundle]", STEP + "[bundle]"))
    with pytest.raises(RecipeError, match="not iq4_nl; leave out the step"):
        plan_bundle(Order(coded, tmp_path / "out", Cache(tmp_path / "cache")))


def test_a_missing_bitsandbytes_is_told_at_plan_time(recipe, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(MissingExtra, match=r"pip install 'llmpack\[nf4\]'"):
        plan_bundle(order_of(recipe))


def test_the_same_recipe_gives_the_same_bytes(built, recipe, tmp_path):
    form, graph = built.plan.file_format, built.plan.graph
    form.write(built.checkpoint, graph, tmp_path, built.plan.facts)
    for name in built.artifact.sizes:
        assert (tmp_path / name).read_bytes() == (built.final / name).read_bytes()
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
