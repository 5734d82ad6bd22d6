"""Rules A4 and B1 to B3: what is refused before a byte of data is mapped."""

import json
import os
import random
import struct

import numpy as np
import pytest
from checkpoint_files import file_bytes, is_refused, rules, safetensors_bytes, some_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llmpack.checkpoint.safetensors_header import read_header
from llmpack.errors import InputRejected


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def made(tensors, data=b"", **other):
    return file_bytes(json.dumps({**tensors, **other}).encode(), data)


PAIR = '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
BAD = {
    "seven bytes": (b"1234567", "safetensors-header"),
    "header of nothing": (struct.pack("<Q", 0) + b"{}", "safetensors-header"),
    "header longer than the file": (struct.pack("<Q", 99) + b"{}", "safetensors-header"),
    "header beyond 100 MB": (struct.pack("<Q", 100_000_001) + b"{}", "safetensors-header"),
    "header length 2^64 - 1": (struct.pack("<Q", 2**64 - 1) + b"{}", "safetensors-header"),
    "not JSON": (file_bytes(b"{abc", b""), "safetensors-header"),
    "bad UTF-8": (file_bytes(b'{"\xff": 1}', b""), "safetensors-header"),
    "a list": (file_bytes(b"[1, 2]", b""), "safetensors-header"),
    "white space first": (file_bytes(b" {}", b""), "safetensors-header"),
    "zero bytes as padding": (file_bytes(b"{}\0\0", b""), "safetensors-header"),
    "deep JSON": (file_bytes(b'{"a":' + b"[" * 100_000, b""), "safetensors-header"),
    "number of 5000 digits": (file_bytes(b'{"a":' + b"9" * 5000 + b"}", b""), "safetensors-header"),
    "metadata of numbers": (made({}, __metadata__={"a": 1}), "safetensors-header"),
    "entry without shape": (made({"a": {"dtype": "F32", "data_offsets": [0, 0]}}), "safetensors-header"),
    "entry with more": (made({"a": entry([0], 0, 0) | {"extra": 1}}), "safetensors-header"),
    "entry is a text": (made({"a": "F32"}), "safetensors-header"),
    "unknown dtype": (made({"a": entry([1], 0, 4, "F33")}, b"1234"), "safetensors-header"),
    "dtype is a list": (made({"a": entry([1], 0, 4, ["F32"])}, b"1234"), "safetensors-header"),
    "dtype that llmpack does not read": (made({"a": entry([1], 0, 1, "F8_E4M3")}, b"1"), "safetensors-header"),
    "overlap": (made({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"0" * 12), "safetensors-header"),
    "same bytes twice": (made({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, b"0" * 8), "safetensors-header"),
    "hole": (made({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"0" * 12), "safetensors-header"),
    "hole at the start": (made({"a": entry([1], 4, 8)}, b"0" * 8), "safetensors-header"),
    "trailing bytes": (made({"a": entry([1], 0, 4)}, b"0" * 5), "safetensors-header"),
    "shape overflow": (made({"a": entry([2**62, 2**62], 0, 4)}, b"0000"), "safetensors-header"),
    "shape that wraps to the right size": (made({"a": entry([2**62 + 1], 0, 4)}, b"0000"), "safetensors-header"),
    "negative size": (made({"a": entry([-1], 0, 4)}, b"0000"), "safetensors-header"),
    "size is true": (made({"a": entry([True], 0, 4)}, b"0000"), "safetensors-header"),
    "size is 1.0": (made({"a": entry([1.0], 0, 4)}, b"0000"), "safetensors-header"),
    "nine dimensions": (made({"a": entry([1] * 9, 0, 4)}, b"0000"), "safetensors-header"),
    "begin after end": (made({"a": entry([1], 4, 0)}, b"0000"), "safetensors-header"),
    "three offsets": (
        made({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, b"0000"),
        "safetensors-header",
    ),
    "shape and bytes differ": (made({"a": entry([2], 0, 4)}, b"0000"), "safetensors-header"),
    "duplicate keys": (file_bytes(f"{{{PAIR},{PAIR}}}".encode(), b"0"), "safetensors-header"),
    "empty name": (made({"": entry([1], 0, 4)}, b"0000"), "safetensors-header"),
    "control character": (made({"a\nb": entry([1], 0, 4)}, b"0000"), "safetensors-header"),
    "right-to-left mark": (made({"a\u202eb": entry([1], 0, 4)}, b"0000"), "safetensors-header"),
    "name with dots": (made({"../../etc/passwd": entry([1], 0, 4)}, b"0000"), "safetensors-header"),
    "long name": (made({"a" * 513: entry([1], 0, 4)}, b"0000"), "safetensors-header"),
    "half a surrogate pair": (file_bytes(b'{"\\ud800":{}}', b""), "safetensors-header"),
    "data cut off": (made({"a": entry([4], 0, 16)}, b"0" * 7), "truncated"),
    "no data at all": (made({"a": entry([4], 0, 16)}), "truncated"),
    "empty file": (b"", "not-weights"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "not-weights"),
    "web page": (b"\n<!DOCTYPE html><html>Please log in</html>", "not-weights"),
    "error of a server": (b'{"error":"Repository not found"}', "not-weights"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_by_rule(tmp_path, case):
    data, rule = BAD[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputRejected) as refusal:
        read_header(path)
    assert rules(refusal) == {rule}
    assert all(problem.where == str(path) and problem.message for problem in refusal.value.problems)


def test_truncation_names_expected_and_actual_bytes(tmp_path):
    path = tmp_path / "model.safetensors"
    whole = safetensors_bytes(some_tensors())
    path.write_bytes(whole[:-3])
    with pytest.raises(InputRejected, match=f"expected {len(whole)} bytes, got {len(whole) - 3}"):
        read_header(path)


def test_every_problem_is_told(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(made({"a": entry([1], 0, 4, "F33"), "b": entry([-1], 4, 8), "c": entry([1], 8, 12)}, b"0" * 12))
    with pytest.raises(InputRejected) as refusal:
        read_header(path)
    assert len(refusal.value.problems) == 2


def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(InputRejected) as refusal:
        read_header(tmp_path / "model.safetensors")
    assert rules(refusal) == {"not-weights"}


def test_a_good_file_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = some_tensors()
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    raw = path.read_bytes()
    assert header.metadata == {"format": "pt"}
    assert header.tensors.keys() == tensors.keys()
    for name, stored in header.tensors.items():
        assert stored.shape == tensors[name].shape
        assert raw[stored.offset : stored.offset + stored.nbytes] == tensors[name].tobytes()


def library_accepts(path):
    try:
        with safe_open(path, framework="np") as file:
            list(file.keys())
    except SafetensorError:
        return False
    return True


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_give_a_header_or_a_refusal(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(data)
    assert is_refused(read_header, path) or library_accepts(path)


def test_mutations_of_a_good_file_give_a_header_or_a_refusal(tmp_path):
    """And what llmpack accepts, the library accepts too."""
    path = tmp_path / "mutated.safetensors"
    good = safetensors_bytes({"a": np.zeros((2, 3), "<f4"), "b": np.zeros(4, "<f2")}, {"k": "v"})
    chance = random.Random(5)
    accepted = 0
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            kind, at = chance.randrange(3), chance.randrange(len(data))
            if kind == 0:
                data[at] = chance.randrange(256)
            elif kind == 1:
                data[at:at] = chance.choice([b"9", b'"', b"{", b"[", b"\\", b" ", b"\0", b"-"])
            else:
                del data[at : at + chance.randint(1, 4)]
        path.write_bytes(data)
        if not is_refused(read_header, path):
            accepted += 1
            assert library_accepts(path)
    assert accepted > 50
