"""The model of a safetensors bundle, opened by what a manifest says."""

import json
import shutil

import pytest

from llmpack.digest import sha256_file
from llmpack.errors import InputRejected
from llmpack.formats.bundle import model_digest
from llmpack.pipeline.model_folder import ModelFolder

FILES = ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_folder_says_what_it_is(checkpoint_factory):
    folder = checkpoint_factory()
    found = ModelFolder.open(folder, {"files": FILES})
    assert found.size == sum((folder / name).stat().st_size for name in FILES)
    assert found.digest() == model_digest({name: sha256_file(folder / name) for name in FILES})
    rows = {name: (shape, encoding) for name, shape, encoding, _ in found.rows()}
    assert rows["model.norm.weight"] == ((64,), "f32")
    assert not found.outline.in_llama


@pytest.mark.parametrize("name", ["../config.json", "absent.safetensors", "/etc/passwd"])
def test_files_that_are_not_in_the_folder_are_not_looked_for_elsewhere(name, checkpoint_factory):
    with pytest.raises(InputRejected, match="is no file of this folder"):
        ModelFolder.open(checkpoint_factory(), {"files": [*FILES, name]})


def test_codes_are_counted_to_the_tensor_that_they_are_of(checkpoint_factory, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint_factory(), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    whole = tensors.pop("model.layers.0.mlp.up_proj.weight")
    tensors["model.layers.0.mlp.up_proj.qweight"] = whole[:8].clone()
    tensors["model.layers.0.mlp.up_proj.scales"] = whole[:1].clone()
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    rows = {row[0]: row[1:] for row in ModelFolder.open(tmp_path / "m", {"files": FILES}).rows()}
    up = rows["model.layers.0.mlp.up_proj.weight"]
    assert up == (tuple(whole.shape), "gptq", 9 * whole.shape[1] * whole.element_size())
