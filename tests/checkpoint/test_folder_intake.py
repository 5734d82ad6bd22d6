"""Rules A1 to A5 and C2: which files of a folder make up the model."""

import json
import os

import pytest
from checkpoint_files import rules, write_index, write_sharded

from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.errors import EnvironmentProblem, InputRejected

INDEX = "model.safetensors.index.json"


def refused(folder):
    with pytest.raises(InputRejected) as refusal:
        Checkpoint.open(folder)
    return refusal


@pytest.mark.parametrize(
    "target",
    [
        "../outside/x.safetensors",
        "/etc/x.safetensors",
        "C:\\x.safetensors",
        "C:x.safetensors",
        "\\\\host\\x.safetensors",
        "a\0b.safetensors",
        "",
        "nested/x.safetensors",
        "..safetensors",
        "x.bin",
        "x.safetensors\n",
        7,
        None,
        ["x.safetensors"],
    ],
)
def test_an_index_may_only_name_files_beside_it(sharded, target):
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    write_index(sharded, index | {"model.norm.weight": target})
    refusal = refused(sharded)
    assert rules(refusal) == {"index-path"}
    assert "model.norm.weight" in str(refusal.value)


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"weight_map": []}', '{"weight_map": {}}', '{"a":1,"a":2}'])
def test_an_index_without_a_map_is_refused(sharded, text):
    (sharded / INDEX).write_text(text)
    assert rules(refused(sharded)) == {"index-mismatch"}


def test_missing_and_extra_shards_are_all_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").rename(sharded / "extra.safetensors")
    refusal = refused(sharded)
    assert rules(refusal) == {"index-mismatch"}
    assert "model-00002-of-00002.safetensors is in the index" in str(refusal.value)
    assert "extra.safetensors lies in the folder" in str(refusal.value)


def test_tensors_in_another_shard_than_the_index_says_are_named(sharded):
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    shards = sorted(set(index.values()))
    del index["model.norm.weight"]
    write_index(sharded, index | {"count": shards[1], "ghost": shards[0]})
    refusal = refused(sharded)
    assert rules(refusal) == {"index-mismatch"}
    for name in ("count", "ghost", "model.norm.weight"):
        assert repr(name) in str(refusal.value)


def test_a_tensor_in_two_shards_is_refused(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))
    first.write_bytes(second.read_bytes())
    assert "index-mismatch" in rules(refused(sharded))


def test_several_files_need_an_index(sharded):
    (sharded / INDEX).unlink()
    assert rules(refused(sharded)) == {"index-mismatch"}


def test_a_single_file_beside_an_index_that_does_not_name_it_is_refused(sharded, folder):
    (sharded / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert rules(refused(sharded)) == {"index-mismatch"}


def test_the_second_copy_that_mistral_publishes_is_left_alone(sharded):
    (sharded / "consolidated.safetensors").write_bytes(b"not read")
    assert len(Checkpoint.open(sharded).tensors) == 3


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_links_out_of_the_folder_are_refused(folder, tmp_path, name):
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    assert rules(refused(folder)) == {"symlink-escape"}


def test_links_inside_the_folder_are_followed(folder):
    (folder / "data").mkdir()
    (folder / "model.safetensors").rename(folder / "data" / "weights")
    (folder / "model.safetensors").symlink_to("data/weights")
    assert len(Checkpoint.open(folder).tensors) == 3


def in_cache(folder, tmp_path, repository="models--org--name", blobs=None):
    """The folder as a snapshot of the hub's cache."""
    home = tmp_path / "hub" / repository
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    store = blobs or home / "blobs"
    store.mkdir(parents=True)
    for index, path in enumerate(sorted(folder.iterdir())):
        path.rename(store / f"{index:040x}")
        (snapshot / path.name).symlink_to(os.path.relpath(store / f"{index:040x}", snapshot))
    return snapshot


def test_links_of_the_hub_cache_are_followed_into_its_own_blobs(folder, tmp_path):
    assert len(Checkpoint.open(in_cache(folder, tmp_path)).tensors) == 3


def test_links_into_the_blobs_of_another_repository_are_refused(folder, tmp_path):
    snapshot = in_cache(folder, tmp_path, blobs=tmp_path / "hub" / "models--org--other" / "blobs")
    assert rules(refused(snapshot)) == {"symlink-escape"}


def test_a_broken_link_and_a_loop_are_refused(sharded):
    first = sorted(sharded.glob("*.safetensors"))[0]
    first.unlink()
    first.symlink_to(first.name)
    assert "symlink-escape" in rules(refused(sharded))
    first.unlink()
    first.symlink_to("nowhere")
    assert "symlink-escape" in rules(refused(sharded))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "x.ckpt", "x.pkl", "tf_model.h5", "model.onnx"]
)
def test_pickles_alone_are_refused_and_never_opened(folder, name):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / name)  # opening it would wait for ever
    refusal = refused(folder)
    assert rules(refusal) == {"pickle-weights"}
    assert name in str(refusal.value)


def test_pickles_beside_safetensors_are_left_alone(folder):
    os.mkfifo(folder / "pytorch_model.bin")
    assert len(Checkpoint.open(folder).tensors) == 3


def test_a_folder_without_weights_says_so(folder):
    (folder / "model.safetensors").unlink()
    assert rules(refused(folder)) == {"not-weights"}
    (folder / "x.gguf").write_bytes(b"")
    assert "x.gguf" in str(refused(folder).value)


def test_a_broken_download_is_named(folder):
    (folder / "model.safetensors").rename(folder / "model.safetensors.incomplete")
    assert rules(refused(folder)) == {"not-weights"}


@pytest.mark.parametrize("name", ["modeling_x.py", "sub/deep/x.py", "native.so"])
def test_code_in_the_folder_is_refused(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("raise SystemExit")
    refusal = refused(folder)
    assert rules(refusal) == {"remote-code"}
    assert name in str(refusal.value)


def test_hidden_folders_are_not_searched_for_code(folder):
    (folder / ".git" / "hooks").mkdir(parents=True)
    before = Checkpoint.open(folder)
    (folder / ".git" / "hooks" / "x.py").write_text("")
    assert Checkpoint.open(folder).tensors.keys() == before.tensors.keys() != set()


def test_no_folder_and_no_config(tmp_path, folder):
    with pytest.raises(EnvironmentProblem, match="no such folder"):
        Checkpoint.open(tmp_path / "nowhere")
    (folder / "config.json").unlink()
    assert rules(refused(folder)) == {"config-json"}


def test_problems_of_different_files_come_together(tmp_path):
    folder = write_sharded(tmp_path / "m")
    (folder / "config.json").write_text("[]")
    (folder / "code.py").write_text("")
    first, second = sorted(folder.glob("*.safetensors"))
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes()[:-1])
    (folder / "tokenizer.json").write_text("{}")
    expected = {"config-json", "remote-code", "not-weights", "truncated", "tokenizer"}
    assert rules(refused(folder)) == expected
