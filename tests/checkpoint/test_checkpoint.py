"""Reading: numbers as stored, views without copies, one digest for one content, cheap opening."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoint_files import (
    CONFIG,
    TOKENIZER,
    file_bytes,
    rules,
    safetensors_bytes,
    some_tensors,
    write_folder,
    write_sharded,
)
from safetensors.torch import save_file

from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.encodings import encoding
from llmpack.errors import InputRejected


def test_a_folder_is_read_as_it_was_saved(tmp_path):
    folder = write_folder(tmp_path / "m")
    torch.manual_seed(0)
    saved = {
        "matrix": torch.randn(5, 8),
        "half": torch.randn(3, 4).half(),
        "brain": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(2.5),
        "counts": torch.arange(4),
        "flags": torch.tensor([True, False]),
        "cube": torch.randn(2, 3, 4).double(),
        "empty": torch.empty(0, 3),
    }
    save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    assert list(checkpoint.tensors) == sorted(saved)
    for name, tensor in saved.items():
        assert checkpoint.read(name).dtype == tensor.dtype
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
    assert checkpoint.tensors["brain"].encoding == "bf16"
    assert checkpoint.config["hidden_size"] == 8


def test_a_copy_that_was_read_may_be_changed(folder):
    checkpoint = Checkpoint.open(folder)
    name = "model.embed_tokens.weight"
    before = checkpoint.read(name).clone()
    checkpoint.read(name).zero_()
    assert torch.equal(checkpoint.read(name), before)


def test_packed_rows_are_views_of_the_file(folder):
    checkpoint = Checkpoint.open(folder)
    packed = checkpoint.packed("model.embed_tokens.weight")
    assert packed.shape == (12, 32)
    assert packed.tobytes() == some_tensors()["model.embed_tokens.weight"].tobytes()
    assert not packed.flags.writeable
    assert not packed.flags.owndata
    assert checkpoint.packed("model.norm.weight").shape == (1, 16)
    assert checkpoint.packed("count").shape == (1, 8)


def test_views_stay_valid_after_release(folder):
    checkpoint = Checkpoint.open(folder)
    packed = checkpoint.packed("model.norm.weight")
    checkpoint.release(["model.norm.weight", "count"])
    checkpoint.release()
    assert packed.tobytes() == some_tensors()["model.norm.weight"].tobytes()


def test_a_file_that_changes_after_opening_is_noticed(folder):
    checkpoint = Checkpoint.open(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputRejected) as refusal:
        checkpoint.read("count")
    assert rules(refusal) == {"changed"}


def test_an_unknown_tensor_is_a_key_error(folder):
    with pytest.raises(KeyError):
        Checkpoint.open(folder).read("nothing")


@pytest.mark.parametrize("dtype", ["<f2", "<f4"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_values_that_are_not_finite_are_named(folder, dtype, value):
    tensors = some_tensors() | {"bad.one": np.array([[1, value]], dtype), "bad.two": np.array([value], dtype)}
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    with pytest.raises(InputRejected) as refusal:
        Checkpoint.open(folder).check_finite()
    assert rules(refusal) == {"non-finite"}
    assert [p.message.split("'")[1] for p in refusal.value.problems] == ["bad.one", "bad.two"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_floats_are_checked_too(folder, dtype):
    extremes = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).tiny, 0.0], dtype=dtype)
    save_file({"good": extremes}, folder / "model.safetensors")
    Checkpoint.open(folder).check_finite()
    save_file({"bad": torch.tensor([0.0, float("inf")], dtype=dtype)}, folder / "model.safetensors")
    with pytest.raises(InputRejected, match="bad"):
        Checkpoint.open(folder).check_finite()


class Listening:
    """Keeps what a progress is told."""

    def __init__(self):
        self.said = []
        self.tasks = []

    def task(self, title, total):
        self.tasks.append([title, total, 0])
        return self

    def __enter__(self):
        return self.done

    def __exit__(self, *_):
        return None

    def done(self, count):
        self.tasks[-1][2] += count

    def say(self, message):
        self.said.append(message)


def test_a_tensor_of_zeros_is_mentioned_and_allowed(folder):
    tensors = some_tensors() | {"model.dead.weight": np.zeros((2, 2), "<f4")}
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    listening = Listening()
    Checkpoint.open(folder).check_finite(listening)
    assert len(listening.said) == 1
    assert "model.dead.weight" in listening.said[0]
    total = sum(array.nbytes for array in tensors.values())
    assert listening.tasks == [["checking weights", total, total]]


def test_the_digest_does_not_see_where_shards_begin(tmp_path):
    one = Checkpoint.open(write_folder(tmp_path / "one"))
    two = Checkpoint.open(write_sharded(tmp_path / "two"))
    assert one.digest == two.digest


def test_the_digest_sees_every_kind_of_content(tmp_path):
    digests = [Checkpoint.open(write_folder(tmp_path / "plain")).digest]
    other = write_folder(tmp_path / "config", CONFIG | {"rms_norm_eps": 1e-6})
    digests.append(Checkpoint.open(other).digest)
    other = write_folder(tmp_path / "tokenizer", tokenizer=TOKENIZER | {"version": "2.0"})
    digests.append(Checkpoint.open(other).digest)
    for change in ("value", "name", "shape", "dtype"):
        tensors = some_tensors()
        if change == "value":
            tensors["count"] = tensors["count"] + 1
        elif change == "name":
            tensors["counts"] = tensors.pop("count")
        elif change == "shape":
            tensors["count"] = tensors["count"].reshape(1)
        else:
            tensors["model.norm.weight"] = tensors["model.norm.weight"].view("<i8").view("u1")
        other = write_folder(tmp_path / change)
        (other / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        digests.append(Checkpoint.open(other).digest)
    assert len(set(digests)) == len(digests)


def test_hashing_is_done_once(folder):
    checkpoint, listening = Checkpoint.open(folder), Listening()
    checkpoint.check_finite(listening)
    checkpoint.hash_tensors(listening)
    assert [title for title, _, _ in listening.tasks] == ["checking weights", "hashing weights"]
    assert listening.tasks[1][1] == 0
    assert checkpoint.digest == Checkpoint.open(folder).digest


def packed_folder(folder, kind, shape, stored, claim=None):
    """A folder with one tensor of blocks, as llmpack stores it; `claim` replaces its metadata."""
    entry = claim or {"encoding": kind, "shape": list(shape)}
    note = {"format": 1, "encodings": {"w": entry}}
    data = safetensors_bytes({"w": stored}, {"llmpack": json.dumps(note)})
    (folder / "model.safetensors").write_bytes(data)
    return folder


def test_blocks_of_codes_are_decoded(folder):
    torch.manual_seed(0)
    W = torch.randn(6, 64)
    blocks = encoding("q8_0").encode(W)
    checkpoint = Checkpoint.open(packed_folder(folder, "q8_0", W.shape, blocks))
    assert checkpoint.tensors["w"].encoding == "q8_0"
    assert checkpoint.tensors["w"].shape == (6, 64)
    assert np.array_equal(checkpoint.packed("w"), blocks)
    assert torch.equal(checkpoint.read("w"), encoding("q8_0").decode(blocks, 64))
    checkpoint.check_finite()
    assert (checkpoint.stored("w").encoding, checkpoint.stored("w").shape) == ("q8_0", (6, 64))


def test_blocks_with_an_infinite_scale_are_named(folder):
    blocks = encoding("q8_0").encode(torch.ones(2, 32))
    blocks[1, :2] = np.array([np.inf], "<f2").view("u1")
    with pytest.raises(InputRejected) as refusal:
        Checkpoint.open(packed_folder(folder, "q8_0", (2, 32), blocks)).check_finite()
    assert rules(refusal) == {"non-finite"}


@pytest.mark.parametrize(
    "claim",
    [
        {"encoding": "q8_1000", "shape": [2, 32]},
        {"encoding": "f32", "shape": [2, 32]},
        {"encoding": ["q8_0"], "shape": [2, 32]},
        {"encoding": "q8_0", "shape": [2, 31]},
        {"encoding": "q8_0", "shape": [4, 32]},
        {"encoding": "q8_0", "shape": []},
        {"encoding": "q8_0", "shape": [-2, 32]},
        {"encoding": "q8_0", "shape": "2, 32"},
        {"encoding": "q8_0"},
        ["q8_0", [2, 32]],
    ],
)
def test_metadata_that_does_not_fit_the_bytes_is_refused(folder, claim):
    with pytest.raises(InputRejected) as refusal:
        Checkpoint.open(packed_folder(folder, "q8_0", (2, 32), np.zeros((2, 34), "u1"), claim))
    assert rules(refusal) == {"safetensors-header"}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 2}', '{"format": 1}', '{"format": 1, "encodings": {"ghost": {}}}']
)
def test_bad_metadata_is_refused(folder, text):
    (folder / "model.safetensors").write_bytes(safetensors_bytes(some_tensors(), {"llmpack": text}))
    with pytest.raises(InputRejected) as refusal:
        Checkpoint.open(folder)
    assert rules(refusal) == {"safetensors-header"}


OPEN_LARGE = """
import sys
from pathlib import Path
from llmpack.checkpoint.checkpoint import Checkpoint
checkpoint = Checkpoint.open(Path(sys.argv[1]))
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(len(checkpoint.tensors), int(peak.split()[1]), "torch" in sys.modules)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_folder_of_the_8b_class_opens_by_its_headers(tmp_path):
    """Four sparse shards of 10 GB, a vocabulary of 128k and 280k merges: small memory, no torch."""
    folder = write_folder(tmp_path / "large", CONFIG | {"vocab_size": 128_256})
    (folder / "model.safetensors").unlink()
    placed = {}
    for shard in range(4):
        header, offset = {}, 0
        for block in range(8 * shard, 8 * shard + 8):
            for part, shape in (("q", [4096, 4096]), ("k", [1024, 4096]), ("down", [4096, 14336])):
                nbytes = 2 * shape[0] * shape[1]
                name = f"model.layers.{block}.{part}.weight"
                header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + nbytes]}
                offset += nbytes
                placed[name] = f"model-{shard}.safetensors"
        raw = json.dumps(header).encode()
        with (folder / f"model-{shard}.safetensors").open("wb") as file:
            file.write(file_bytes(raw, b""))
            file.truncate(8 + len(raw) + offset)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    vocab = {f"Ġtoken{i}": i for i in range(128_000)}
    merges = [[f"Ġto{i}", f"ken{i}"] for i in range(280_000)]
    (folder / "tokenizer.json").write_text(
        json.dumps({"added_tokens": [], "model": {"type": "BPE", "vocab": vocab, "merges": merges}}, indent=1)
    )
    found = subprocess.run(
        [sys.executable, "-c", OPEN_LARGE, str(folder)], check=True, capture_output=True, text=True
    ).stdout.split()
    assert found[0] == "96"
    assert int(found[1]) < 120 * 1024
    assert found[2] == "False"
