"""Commands on a real small bundle: what they print, what they answer in JSON, and the code they end with."""

import json
import shutil
from pathlib import Path

import pytest
from small_recipe import RECIPE, SHORT

from llmpack.pipeline.build import build_bundle
from llmpack.pipeline.cache import Cache
from llmpack.pipeline.state import Order

pytestmark = pytest.mark.xdist_group("pipeline-build")


@pytest.fixture(scope="module")
def place(tmp_path_factory, packable):
    """Two recipes, of which one asks for nothing that must be measured, a cache, and a bundle."""
    folder = tmp_path_factory.mktemp("commands")
    recipe = folder / "tiny.toml"
    recipe.write_text(RECIPE.format(model=packable))
    (folder / "unmeasured.toml").write_text(recipe.read_text().replace('memory = "600 MiB"\n', ""))
    build_bundle(Order(recipe, folder / "out", Cache(folder / "cache"), protocol=SHORT))
    return folder


def test_build_prints_the_verdict_and_answers_json(llmpack, place):
    recipe = place / "unmeasured.toml"
    code, out, _ = llmpack("build", recipe, "--out", place / "again")
    assert code == 0
    assert "PASS" in out
    assert str(place / "again" / "tiny") in out
    code, out, _ = llmpack("build", recipe, "--out", place / "again", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["steps"][0]["cached"] is True
    assert {row["status"] for row in answer["verdicts"][0]["rows"]} == {"PASS"}


def test_plan_prints_exact_bytes(llmpack, place):
    nbytes = (place / "out" / "tiny" / "model.gguf").stat().st_size
    code, out, _ = llmpack("plan", place / "tiny.toml")
    assert code == 0
    assert f"{nbytes:,} bytes" in out
    assert "cached" in out
    code, out, _ = llmpack("plan", place / "tiny.toml", "--json")
    assert json.loads(out)["model_bytes"] == nbytes


def test_a_missed_budget_is_exit_4_and_tells_the_rows(llmpack, place):
    code, out, err = llmpack(
        "build", place / "unmeasured.toml", "--out", place / "none", "--set", "budget.quality.top1=1.0"
    )
    assert code == 4
    assert out == ""
    assert "quality.top1" in err
    assert "FAIL" in err
    assert not (place / "none" / "tiny").exists()
    code, out, _ = llmpack("plan", place / "tiny.toml", "--set", "budget.disk=1MB", "--json")
    assert code == 4
    assert [row["limit"] for row in json.loads(out)["verdicts"][0]["rows"] if row["status"] == "FAIL"] == ["disk"]


def test_check_judges_again_without_measuring(llmpack, place):
    code, out, _ = llmpack("check", place / "out" / "tiny")
    assert code == 0
    assert "from the evidence at hand" in out
    code, out, _ = llmpack("check", place / "out" / "tiny", "--budget", "memory=10MiB", "--json")
    answer = json.loads(out)
    assert code == 4
    assert answer["measured"] is False
    row = next(row for row in answer["verdicts"][0]["rows"] if row["limit"] == "memory")
    assert row["status"] == "FAIL"


def test_check_for_a_device_that_is_not_at_hand(llmpack, place):
    there = ("--device", "raspberry-pi-5-8gb")
    assert llmpack("check", place / "out" / "tiny", *there)[0] == 4
    assert llmpack("check", place / "out" / "tiny", *there, "--accept", "estimate")[0] == 0


def test_check_of_a_bare_file_knows_only_what_is_asked(llmpack, place):
    file = place / "out" / "tiny" / "model.gguf"
    code, out, _ = llmpack("check", file, "--budget", "disk=8MB", "--budget", "context=128", "--json")
    assert code == 0
    assert [row["limit"] for row in json.loads(out)["verdicts"][0]["rows"]] == ["disk"]
    assert llmpack("check", file, "--budget", "disk=1MB", "--budget", "context=128")[0] == 4


@pytest.mark.parametrize("limit", ["memroy=1MiB", "memory=2G", "context=9999"])
def test_check_refuses_limits_that_cannot_be(llmpack, place, limit):
    assert llmpack("check", place / "out" / "tiny", "--budget", limit)[0] == 3


def test_verify_finds_one_changed_byte(llmpack, place, tmp_path):
    assert llmpack("verify", place / "out" / "tiny")[0] == 0
    copy = tmp_path / "tiny"
    shutil.copytree(place / "out" / "tiny", copy)
    data = bytearray((copy / "model.gguf").read_bytes())
    data[-100] ^= 1
    (copy / "model.gguf").write_bytes(data)
    code, _, err = llmpack("verify", copy)
    assert code == 8
    assert "model.gguf was changed" in err
    assert llmpack("check", copy)[0] == 8


def test_verify_finds_a_rewritten_manifest(llmpack, place, tmp_path):
    from llmpack.formats.bundle import write_sums

    copy = tmp_path / "tiny"
    shutil.copytree(place / "out" / "tiny", copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["made"]["source"]["digest"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    write_sums(copy)
    code, _, err = llmpack("verify", copy)
    assert code == 8
    assert "is not what its digest says" in err


def test_eval_compares_with_the_source(llmpack, place):
    code, out, _ = llmpack("eval", place / "out" / "tiny", "--json")
    assert code == 0
    assert json.loads(out)["quality"]["tokens"] == 256
    code, out, _ = llmpack("eval", place / "out" / "tiny", "--text", "python:argparse", "--tokens", "128")
    assert code == 0
    assert "on 128 tokens of python:argparse" in out


def test_run_answers_on_stdout(llmpack, place):
    code, out, _ = llmpack("run", place / "out" / "tiny", "Hello", "--tokens", "4", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["tokens"] == 4
    code, out, _ = llmpack("run", place / "out" / "tiny", "Hello", "--tokens", "4")
    assert out == answer["answer"] + "\n"


def test_inspect_knows_bundles_files_and_checkpoints(llmpack, place, packable):
    code, out, _ = llmpack("inspect", place / "out" / "tiny", "--json")
    answer = json.loads(out)
    assert (code, answer["kind"]) == (0, "bundle")
    assert set(answer["encodings"]) == {"iq4_nl", "q8_0", "f32"}
    assert sum(e["bytes"] for e in answer["encodings"].values()) < answer["bytes"]
    assert "checkpoint" in llmpack("inspect", packable)[1]
    assert "blk.0.attn_q.weight" in llmpack("inspect", place / "out" / "tiny" / "model.gguf", "--tensors")[1]
    assert llmpack("inspect", place / "nothing")[0] == 2


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("steps", ("quantize.gptq", "quantize.rtn", "quantize.llamacpp")),
        ("encodings", ("iq4_nl", "q4_0", "q8_0", "q4_k")),
        ("devices", ("raspberry-pi-5-8gb",)),
        ("families", ("llama", "mistral")),
    ],
)
def test_lists_name_everything_with_a_meaning(llmpack, what, names):
    code, out, _ = llmpack("list", what, "--json")
    rows = json.loads(out)
    assert code == 0
    assert set(names) <= {str(next(iter(row.values()))) for row in rows}
    assert all(row["meaning"] for row in rows)
    plain = llmpack("list", what)[1]
    assert all(name in plain for name in names)


def test_an_unknown_list_is_exit_2_with_a_suggestion(llmpack):
    code, _, err = llmpack("list", "step")
    assert code == 2
    assert "did you mean `steps`?" in err


def test_the_schema_is_printed_as_it_is_checked_in(llmpack):
    assert llmpack("schema")[1] == (Path(__file__).parents[2] / "recipes" / "recipe.schema.json").read_text()


def test_the_cache_is_listed_checked_and_cleaned(llmpack, place, tmp_path):
    rows = json.loads(llmpack("cache", "ls", "--json")[1])
    assert {"step", "reference", "evidence", "corpus", "digest"} <= {row["kind"] for row in rows}
    assert llmpack("cache", "verify")[:2] == (0, "")
    other = tmp_path / "cache"
    shutil.copytree(place / "cache", other)
    weights = next((other / "step").rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    code, out, _ = llmpack("cache", "verify", "--cache", other)
    assert code == 8
    assert weights.name in out
    key = next((other / "step").iterdir()).name
    assert llmpack("cache", "gc", "--key", key[:12], "--cache", other)[0] == 0
    assert not (other / "step" / key).exists()
    assert llmpack("cache", "gc", "--key", "zz", "--cache", other)[0] == 2
    assert llmpack("cache", "gc", "--days", "0", "--cache", other)[0] == 0
    assert json.loads(llmpack("cache", "ls", "--cache", other, "--json")[1]) == []


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def remote_code(folder):
    (folder / "modeling.py").write_text("import os\n")


def unknown_family(folder):
    change(folder, architectures=["GPT9ForCausalLM"])


def quantized(folder):
    change(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def larger_tokenizer(folder):
    change(folder, vocab_size=49000)


def not_finite(folder):
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def missing_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def index_outside(folder):
    weights = {"model.norm.weight": "../outside.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    (folder / "model.safetensors").unlink()


def change(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_weights, "safetensors"),
        (cut_off, "model.safetensors"),
        (pickle_only, "pickle"),
        (remote_code, "modeling.py"),
        (unknown_family, "GPT9ForCausalLM"),
        (quantized, "quantized"),
        (larger_tokenizer, "tokenizer"),
        (not_finite, "model.norm.weight"),
        (missing_tensor, "model.layers.1.mlp.up_proj.weight"),
        (index_outside, "../outside.safetensors"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_bad_source_is_exit_5_with_its_reason(llmpack, place, packable, tmp_path, damage, message):
    folder = tmp_path / "damaged"
    shutil.copytree(packable, folder)
    damage(folder)
    code, out, _ = llmpack(
        "build", place / "tiny.toml", "--set", f"source.model={folder}", "--out", tmp_path / "out",
        "--cache", tmp_path / "cache", "--json",
    )  # fmt: skip
    error = json.loads(out)["error"]
    assert (code, error["kind"]) == (5, "InputRejected")
    assert message in error["message"]
    assert all(problem["rule"] for problem in error["problems"])
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("schema = 1", 3),
        ("schema = ", 3),
        ("\ufeffschema = 1", 3),
        ("a = " + "9" * 5000, 3),
        ("a = " + "[" * 2000 + "]" * 2000, 3),
        ('schema = 1\nname = "x"\n[source]\nmodel = "/nowhere/at/all"\n', 6),
        ('schema = 1\nname = "x"\n[source]\nmodel = "package:no_such_package_here/x.gguf"\n', 6),
        ('schema = 1\nname = "x"\n[source]\nmodel = "gguf:/nowhere/x.gguf"\n', 6),
    ],
    ids=range(8),
)
def test_a_bad_recipe_is_exit_3_and_an_absent_source_exit_6(llmpack, tmp_path, text, code):
    recipe = tmp_path / "bad.toml"
    recipe.write_text(text)
    for command in ("plan", "build"):
        ended, out, err = llmpack(command, recipe)
        assert (ended, out) == (code, "")
        assert err.startswith("llmpack: ")


def test_a_quantized_source_needs_the_word(llmpack, tmp_path, demo_gguf):
    recipe = tmp_path / "q.toml"
    recipe.write_text(f'schema = 1\nname = "q"\n[source]\nmodel = "{demo_gguf}"\n')
    code, _, err = llmpack("plan", recipe)
    assert code == 5
    assert "dequantize = true" in err
