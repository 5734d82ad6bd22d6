"""The container against the gguf package: the same bytes, and a size known beforehand."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpack.formats.gguf_container import (
    Container,
    TensorEntry,
    Value,
    ValueType,
    boolean,
    float32,
    float32s,
    int32,
    int32s,
    padded,
    string,
    strings,
    uint32,
    value_of,
)

TENSORS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.c": np.arange(5, dtype=np.float16),
    "d": np.ones((2, 34), np.uint8),
}
KEYS = {
    "general.architecture": string("llama"),
    "x.count": uint32(7),
    "x.signed": int32(-7),
    "x.real": float32(0.1),
    "x.flag": boolean(True),
    "x.text": string("grüße 🦙"),
    "x.texts": strings(["a", "", "ü"]),
    "x.numbers": int32s([1, -2, 3]),
    "x.reals": float32s([0.5, -1000.0]),
    "x.flags": Value(ValueType.ARRAY, [True, False], ValueType.BOOL),
}  # fmt: skip


def test_a_file_is_the_gguf_packages_file_byte_for_byte(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_uint32("x.count", 7)
    writer.add_int32("x.signed", -7)
    writer.add_float32("x.real", 0.1)
    writer.add_bool("x.flag", True)
    writer.add_string("x.text", "grüße 🦙")
    for name in ("texts", "numbers", "reals", "flags"):
        writer.add_array(f"x.{name}", KEYS[f"x.{name}"].data)
    for name, values in TENSORS.items():
        writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType.Q8_0 if name == "d" else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    types, shapes = {"a": 0, "b.c": 1, "d": 8}, {"a": (3, 4), "b.c": (5,), "d": (2, 32)}
    entries = [TensorEntry(name, shapes[name], types[name], values.nbytes) for name, values in TENSORS.items()]
    container = Container(KEYS, tuple(entries))
    rows = b"".join(v.tobytes() + bytes(padded(v.nbytes) - v.nbytes) for v in TENSORS.values())
    assert container.header + rows == (tmp_path / "theirs.gguf").read_bytes()
    assert container.nbytes == (tmp_path / "theirs.gguf").stat().st_size


@settings(deadline=None)
@given(st.text(max_size=50), st.lists(st.text(max_size=5), max_size=20), st.integers(0, 2**32 - 1))
def test_packed_lengths_are_those_of_utf8(text, texts, number):
    assert string(text).pack() == struct.pack("<IQ", 8, len(text.encode())) + text.encode()
    packed = strings(texts).pack()
    assert packed[:16] == struct.pack("<IIQ", 9, 8, len(texts))
    assert len(packed) == 16 + sum(8 + len(t.encode()) for t in texts)
    assert uint32(number).pack() == struct.pack("<II", 4, number)
    for value in (string(text), strings(texts), uint32(number), int32s([1, 2]), float32s([]), KEYS["x.flags"]):
        assert value.nbytes == len(value.pack())


@pytest.mark.parametrize("value", [uint32(-1), uint32(2**32), int32(2**31), Value(ValueType.UINT8, 256)])
def test_numbers_out_of_range_are_no_metadata(value):
    with pytest.raises(struct.error):
        value.pack()


def test_plain_values_get_the_converters_types():
    types = [(True, 7), (3, 4), (0.5, 6), ("x", 8), (np.uint16(3), 2), (np.float64(3), 12), (np.int64(-3), 11)]
    for plain, number in types:
        assert value_of(plain).type == number, plain
    for plain, number in [((1, 2), 5), ((0.5,), 6), (("a", "b"), 8), ((True,), 7)]:
        assert (value_of(plain).type, value_of(plain).element) == (9, number)
    assert value_of(np.array([1, 2], np.uint32)) == Value(ValueType.ARRAY, [1, 2], ValueType.UINT32)
    assert value_of(uint32(3)) == uint32(3)
    for plain in (None, {}, [], [1, "a"], [None], object(), b"x"):
        with pytest.raises(TypeError, match="no form in GGUF"):
            value_of(plain)


def test_an_array_of_arrays_is_refused():
    with pytest.raises(ValueError, match="scalars or strings"):
        Value(ValueType.ARRAY, [[1]], ValueType.ARRAY).pack()
