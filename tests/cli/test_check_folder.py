"""`llmpack check` of folders of safetensors files that no bundle is around: any architecture, in transformers."""

from __future__ import annotations

import json
import shutil

import pytest
from command_line import command_line

LIMITS = ("--budget", "memory=2 GiB", "--budget", "disk=1 MB", "--budget", "context=64")


@pytest.fixture
def folder(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "model" / "notes.txt").write_text("not a part of the model" * 1000)
    return tmp_path / "model"


@pytest.fixture
def check(folder, tmp_path, monkeypatch, capsys):
    """Run the command in this process: exit code, stdout, stderr."""
    run = command_line(monkeypatch, capsys, tmp_path / "cache", "check")
    return lambda *arguments: run(folder, *arguments, "--set", "runtime.threads=1")


def rows(out):
    return {row["limit"]: row for row in json.loads(out)["verdicts"][0]["rows"]}


def change(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_it_is_measured_in_transformers(check, folder):
    code, out, err = check(*LIMITS, "--json")
    assert code == 0, err
    memory, disk = rows(out)["memory"], rows(out)["disk"]
    assert memory["evidence"]["kind"] == "measurement"
    assert "transformers" in memory["evidence"]["build"]
    assert memory["value"] > 100 << 20
    parts = [path for path in folder.iterdir() if path.name != "notes.txt"]
    assert disk["value"] == sum(-(-path.stat().st_size // 4096) * 4096 for path in parts)
    code, out, _ = check(*LIMITS, "--budget", "quality.kl=0.1")
    assert code == 4
    assert "a folder alone does not tell which model it was made from" in out


def test_one_that_wants_more_than_the_budget_ends_in_a_verdict(check):
    code, out, err = check(*LIMITS, "--budget", "memory=100 MiB", "--json")
    assert code == 4, err
    row = rows(out)["memory"]
    assert row["status"] == "FAIL"
    assert "more: ended when" in row["reason"]


def test_any_architecture_that_transformers_knows(check, folder):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GPTNeoXConfig(**sizes, vocab_size=512, max_position_embeddings=128)
    (folder / "model.safetensors").unlink()
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    code, out, err = check(*LIMITS, "--json")
    assert code == 0, err
    assert rows(out)["memory"]["status"] == "PASS"
    assert check(*LIMITS, "--budget", "context=256")[0] == 3  # beyond the 128 of its config


def test_other_devices_and_headers_alone_prove_no_speed_and_memory_by_estimate_alone(check, folder, tmp_path):
    for asked in (("--device", "raspberry-pi-5-8gb"), ("--estimate-only",)):
        assert rows(check(*LIMITS, *asked, "--json")[1])["memory"]["status"] == "UNMEASURED"
        code, out, _ = check(*LIMITS, "--budget", "decode=1 tok/s", "--accept", "estimate", *asked, "--json")
        assert code == 4
        assert rows(out)["disk"]["status"] == rows(out)["memory"]["status"] == "PASS"
        assert rows(out)["memory"]["evidence"]["kind"] == "estimate"
        assert rows(out)["decode"]["status"] == "UNMEASURED"
        assert "measured, not estimated" in rows(out)["decode"]["reason"]
    change(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert check("--budget", "disk=1 MB", "--budget", "context=64", "--estimate-only")[0] == 0


def code_of_its_own(folder):
    (folder / "modeling_x.py").write_text("import os\n")


def pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_config(folder):
    (folder / "config.json").unlink()


def adapter(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')


def half_a_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (code_of_its_own, "modeling_x.py"),
        (pickles, "pickle-weights"),
        (no_config, "there is no config.json"),
        (adapter, "an adapter beside the weights"),
        (half_a_file, "model.safetensors"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_bad_folder_is_exit_5(check, folder, damage, words):
    damage(folder)
    code, out, err = check(*LIMITS)
    assert (code, out) == (5, "")
    assert words in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--set", "runtime.kv=q8_0"), 3, "kv is a setting of llama.cpp"),
        (("--on", "ssh://nobody@127.0.0.1:1"), 2, "--on measures GGUF files"),
        (("--budget", "context=1024"), 3, "beyond the 512 tokens"),
    ],
)
def test_what_cannot_be_asked_of_a_folder(check, arguments, code, words):
    ended, out, err = check(*LIMITS, *arguments)
    assert (ended, out) == (code, "")
    assert words in err


def test_weights_of_another_model_are_refused_by_the_runtime(check, folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    code, _, err = check(*LIMITS)
    assert code == 7
    assert "missing keys: model.layers.1.mlp.up_proj.weight" in err
