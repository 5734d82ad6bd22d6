"""Writing: deterministic bytes, and nothing that a crash at any instant can spoil."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoint_files import write_folder
from safetensors.torch import load_file

from llmpack.checkpoint.checkpoint import Checkpoint, Packed
from llmpack.checkpoint.journal import NAME
from llmpack.checkpoint.writing import CheckpointWriter
from llmpack.encodings import encoding
from llmpack.errors import EnvironmentProblem, StepFailed


def tensors_of(checkpoint):
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_what_is_written_is_read_back(folder, tmp_path):
    base = Checkpoint.open(folder)
    torch.manual_seed(0)
    written = {
        "matrix": torch.randn(5, 8).t(),
        "brain": torch.randn(7).bfloat16(),
        "half": torch.randn(2, 3, 4).half(),
        "scalar": torch.tensor(2.5),
        "counts": torch.arange(4),
        "small": torch.arange(3, dtype=torch.int32),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "empty": torch.empty(0, 3),
    }
    writer = CheckpointWriter(tmp_path / "out", base)
    writer.write("outside", written)
    result = writer.finish()
    assert result.config == base.config
    assert [p.name for p in result.tokenizer_files] == [p.name for p in base.tokenizer_files]
    for name, tensor in written.items():
        assert result.read(name).dtype == tensor.dtype
        assert torch.equal(result.read(name), tensor)
    loaded = load_file(tmp_path / "out" / "outside.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in written.items())


def test_blocks_of_codes_travel_unchanged(folder, tmp_path):
    W = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    blocks = encoding("q4_0").encode(W)
    writer = CheckpointWriter(tmp_path / "a", Checkpoint.open(folder))
    writer.write("block-0000", {"w": Packed("q4_0", (4, 64), blocks), "norm": torch.ones(4)})
    first = writer.finish()
    again = CheckpointWriter(tmp_path / "b", first)
    again.write("block-0000", {name: first.stored(name) for name in first.tensors})
    second = again.finish()
    assert second.tensors["w"].encoding == "q4_0"
    assert np.array_equal(second.packed("w"), blocks)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert torch.equal(Checkpoint.open(tmp_path / "b").read("w"), encoding("q4_0").decode(blocks, 64))


def test_packed_data_must_fit_its_encoding():
    with pytest.raises(ValueError, match="q4_0"):
        Packed("q4_0", (4, 64), np.zeros((4, 35), "u1"))
    with pytest.raises(ValueError, match="multiple"):
        Packed("q4_0", (4, 33), np.zeros((4, 18), "u1"))
    with pytest.raises(ValueError, match="uint8"):
        Packed("f32", (4,), np.zeros((1, 4), "<f4"))


def test_the_order_of_tensors_and_shards_changes_no_content(folder, tmp_path):
    base = Checkpoint.open(folder)
    parts = tensors_of(base)
    results = []
    for name, groups in {
        "one": [parts],
        "turned": [dict(reversed(parts.items()))],
        "split": [{n: t} for n, t in reversed(parts.items())],
    }.items():
        writer = CheckpointWriter(tmp_path / name, base)
        for index, group in enumerate(groups):
            writer.write(f"part-{index}", group)
        results.append(writer.finish())
    assert {r.digest for r in results} == {base.digest}
    assert contents(tmp_path / "one") == contents(tmp_path / "turned")


def test_digests_of_the_journal_are_those_of_the_bytes(folder, tmp_path):
    base = Checkpoint.open(folder)
    writer = CheckpointWriter(tmp_path / "out", base)
    writer.write("outside", {"x": torch.arange(6).float()})
    written = writer.finish()
    assert dict(written.hash_tensors()) == dict(Checkpoint.open(tmp_path / "out").hash_tensors())


def test_a_journal_is_not_believed_in_a_folder_of_strangers_nor_for_another_file(folder, tmp_path):
    writer = CheckpointWriter(tmp_path / "out", Checkpoint.open(folder))
    writer.write("outside", {"x": torch.arange(6).float()})
    honest = writer.finish().digest
    path = tmp_path / "out" / "outside.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # same size, same header
    path.write_bytes(data)
    assert Checkpoint.open(tmp_path / "out").digest != honest
    path.write_bytes(path.read_bytes() + b" ")
    journal = tmp_path / "out" / NAME
    assert journal.exists()
    path.write_bytes(bytes(data).replace(b'"x"', b'"y"'))
    index = tmp_path / "out" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"x"', '"y"'))
    assert Checkpoint.reopen(tmp_path / "out").digest == Checkpoint.open(tmp_path / "out").digest


def test_another_config_replaces_that_of_the_base(folder, tmp_path):
    writer = CheckpointWriter(tmp_path / "out", Checkpoint.open(folder), {"hidden_size": 4, "vocab_size": 12})
    writer.write("outside", {"x": torch.ones(1)})
    assert dict(writer.finish().config) == {"hidden_size": 4, "vocab_size": 12}


def test_finished_shards_and_their_notes_survive(folder, tmp_path):
    base = Checkpoint.open(folder)
    note = {"loss": 0.25, "codes": [1, 2], "tensors": {"x": "q4_0"}}
    CheckpointWriter(tmp_path / "out", base).write("block-0000", {"x": torch.ones(1)}, note)
    (tmp_path / "out" / "block-0001.safetensors").write_bytes(b"half of a shard")
    (tmp_path / "out" / ".block-0001.safetensors.1.tmp").write_bytes(b"")
    writer = CheckpointWriter(tmp_path / "out", base)
    assert writer.finished("block-0000") == note
    assert writer.finished("block-0001") is None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["block-0000.safetensors", NAME]


@pytest.mark.parametrize("damage", ["cut", "grown", "header", "gone"])
def test_a_shard_that_does_not_check_out_does_not_count(folder, tmp_path, damage):
    base = Checkpoint.open(folder)
    writer = CheckpointWriter(tmp_path / "out", base)
    writer.write("block-0000", {"x": torch.ones(4)})
    writer.write("block-0001", {"y": torch.ones(4)})
    path = tmp_path / "out" / "block-0000.safetensors"
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        damaged = {"cut": data[:-1], "grown": data + b"0", "header": data.replace(b"F32", b"I32")}
        path.write_bytes(damaged[damage])
    again = CheckpointWriter(tmp_path / "out", base)
    assert again.finished("block-0000") is None
    assert again.finished("block-0001") == {}
    again.write("block-0000", {"x": torch.ones(4)})
    assert again.finish().tensors.keys() == {"x", "y"}


def test_every_cut_of_the_journal_leaves_whole_lines(folder, tmp_path):
    base = Checkpoint.open(folder)
    writer = CheckpointWriter(tmp_path / "out", base)
    for index in range(3):
        writer.write(f"block-{index}", {f"t{index}": torch.ones(1)}, {"index": index})
    expected = contents(tmp_path / "out")
    journal = tmp_path / "out" / NAME
    whole = journal.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    cuts = {end + step for end in ends for step in (-2, -1, 0, 1, 17)} & set(range(ends[0], len(whole)))
    for cut in sorted(cuts):
        journal.write_bytes(whole[:cut] + b"\0\0" * (cut % 2))
        again = CheckpointWriter(tmp_path / "out", base)
        counted = [index for index in range(3) if again.finished(f"block-{index}") is not None]
        assert counted == list(range(sum(end <= cut for end in ends) - 1))
        for index in range(len(counted), 3):
            again.write(f"block-{index}", {f"t{index}": torch.ones(1)}, {"index": index})
        assert contents(tmp_path / "out") == expected


def test_a_folder_of_something_else_is_left_alone(folder, tmp_path):
    base = Checkpoint.open(folder)
    with pytest.raises(StepFailed, match="no journal of this run"):
        CheckpointWriter(folder, base)
    assert Checkpoint.open(folder).digest == base.digest
    CheckpointWriter(tmp_path / "out", base).write("a", {"x": torch.ones(1)})
    with pytest.raises(StepFailed, match="no journal of this run"):
        CheckpointWriter(tmp_path / "out", base, {"other": "config"})


def test_shards_and_tensors_are_written_once(folder, tmp_path):
    writer = CheckpointWriter(tmp_path / "out", Checkpoint.open(folder))
    with pytest.raises(ValueError, match="without a shard"):
        writer.finish()
    writer.write("a", {"x": torch.ones(1)})
    with pytest.raises(ValueError, match="'a'"):
        writer.write("a", {"y": torch.ones(1)})
    with pytest.raises(ValueError, match="'x'"):
        writer.write("b", {"x": torch.ones(1)})
    for name in ("../b", "", ".b", "b/c"):
        with pytest.raises(ValueError, match="no name for a file"):
            writer.write(name, {"z": torch.ones(1)})
    with pytest.raises(ValueError, match="control"):
        writer.write("b", {"z\n": torch.ones(1)})
    with pytest.raises(ValueError, match="complex64"):
        writer.write("b", {"z": torch.ones(1, dtype=torch.complex64)})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.safetensors", NAME]


CRASHING = """
import os, sys
from pathlib import Path
import numpy as np
from llmpack.checkpoint.checkpoint import Checkpoint, Packed
from llmpack.checkpoint.writing import CheckpointWriter

base, work = Path(sys.argv[1]), Path(sys.argv[2])


def build(folder):
    writer = CheckpointWriter(folder, Checkpoint.open(base))
    for index in range(2):
        if writer.finished(f"block-{index}") is None:
            data = np.arange(64, dtype=np.uint8).reshape(2, 32) + index
            writer.write(f"block-{index}", {f"t{index}": Packed("f32", (2, 8), data)}, {"index": index})
    return writer.finish()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


build(work / "whole")
expected = contents(work / "whole")
events = 0
crash_at = None


def count():
    global events
    events += 1
    if events == crash_at:
        os._exit(9)


def hook(event, arguments):
    if not arguments or str(work) not in str(arguments[0]):
        return
    if event in ("os.rename", "os.remove", "os.mkdir", "os.truncate"):
        count()
    if event == "open" and arguments[1] not in ("r", "rb", None):
        count()


sync = os.fsync
os.fsync = lambda descriptor: (count(), sync(descriptor), count())
sys.addaudithook(hook)
crash = 0
while True:
    crash += 1
    folder = work / f"crash-{crash}"
    child = os.fork()
    if child == 0:
        events, crash_at = 0, crash
        build(folder)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status == 0:
        break
    assert os.waitstatus_to_exitcode(status) == 9, status
    result = build(folder)
    found = contents(folder)
    assert found == expected, (crash, found.keys())
print(crash)
"""


@pytest.mark.skipif(not hasattr(sys, "addaudithook") or sys.platform == "win32", reason="forks")
def test_a_crash_before_or_after_any_write_sync_or_rename_loses_nothing(folder, tmp_path):
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-c", CRASHING, str(folder), str(tmp_path / "work")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) > 40  # so many instants were tried


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from llmpack.checkpoint.checkpoint import Checkpoint, Packed
from llmpack.checkpoint.writing import CheckpointWriter
from llmpack.errors import EnvironmentProblem

writer = CheckpointWriter(Path(sys.argv[2]), Checkpoint.open(Path(sys.argv[1])))
writer.write("block-0", {"a": Packed("u8", (8,), np.zeros((1, 8), np.uint8))})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    writer.write("block-1", {"b": Packed("u8", (1 << 20,), np.zeros((1, 1 << 20), np.uint8))})
except EnvironmentProblem as problem:
    print(problem)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_full_disk_says_what_is_missing_and_keeps_what_is_done(folder, tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(folder), str(tmp_path / "out")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "no room for 1 MiB" in said
    assert "1 finished shards are kept" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["block-0.safetensors", NAME]


JOURNAL_FULL = """
import os, sys
from pathlib import Path
import numpy as np
from llmpack.checkpoint.checkpoint import Checkpoint, Packed
from llmpack.checkpoint.writing import CheckpointWriter
from llmpack.errors import EnvironmentProblem

writer = CheckpointWriter(Path(sys.argv[2]), Checkpoint.open(Path(sys.argv[1])))
tensor = Packed("u8", (8,), np.zeros((1, 8), np.uint8))
writer.write("block-0", {"a": tensor})
sync = os.fsync

def full(descriptor):
    if "journal" in os.readlink(f"/proc/self/fd/{descriptor}"):
        raise OSError(28, "No space left on device")
    sync(descriptor)

os.fsync = full
try:
    writer.write("block-1", {"b": tensor})
except EnvironmentProblem:
    os.fsync = sync
    writer.write("block-2", {"c": tensor})
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_line_of_the_journal_that_did_not_fit_is_taken_back(folder, tmp_path):
    subprocess.run([sys.executable, "-c", JOURNAL_FULL, str(folder), str(tmp_path / "out")], check=True)
    writer = CheckpointWriter(tmp_path / "out", Checkpoint.open(folder))
    assert [writer.finished(f"block-{i}") for i in range(3)] == [{}, None, {}]


def test_a_disk_that_is_too_small_is_noticed_before_writing(folder, tmp_path):
    writer = CheckpointWriter(tmp_path / "out", Checkpoint.open(folder))
    huge = np.broadcast_to(np.zeros((1, 1), np.uint8), (1 << 30, 1 << 26))  # 64 PiB, no memory
    with pytest.raises(EnvironmentProblem, match="free some space"):
        writer.write("a", {"x": Packed("u8", (1 << 30, 1 << 26), huge)})
    assert [path.name for path in (tmp_path / "out").iterdir()] == [NAME]


def test_the_index_names_every_tensor(tmp_path):
    base = Checkpoint.open(write_folder(tmp_path / "m"))
    writer = CheckpointWriter(tmp_path / "out", base)
    writer.write("b", {"y": torch.ones(1)})
    writer.write("a", {"x": torch.ones(1)})
    writer.finish()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"x": "a.safetensors", "y": "b.safetensors"}
