"""The GGUF container, written: typed metadata, tensor table, and where every byte will stand.

A file is header, metadata, tensor table, padding to the alignment, then each tensor's rows, each
padded to the alignment. Everything before the rows is known without data, so the exact size of a
file is known before it is written. Little endian, version 3.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
else:
    from llmpack.lazy import LazyModule

    np = LazyModule("numpy")

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32


class ValueType(IntEnum):
    """Type ids of metadata values."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_SCALARS = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "?",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}

_NUMPY = {
    "uint8": ValueType.UINT8,
    "int8": ValueType.INT8,
    "uint16": ValueType.UINT16,
    "int16": ValueType.INT16,
    "uint32": ValueType.UINT32,
    "int32": ValueType.INT32,
    "float32": ValueType.FLOAT32,
    "bool": ValueType.BOOL,
    "uint64": ValueType.UINT64,
    "int64": ValueType.INT64,
    "float64": ValueType.FLOAT64,
}


def _packed_text(text: str | bytes) -> bytes:
    raw = _utf8(text)
    return struct.pack("<Q", len(raw)) + raw


@dataclass(frozen=True)
class Value:
    """One metadata value.

    type     its type id
    data     the Python value; a sequence for arrays
    element  type id of an array's elements, None for scalars
    """

    type: ValueType
    data: Any
    element: ValueType | None = None

    def pack(self) -> bytes:
        """The bytes that follow the key, type id included. Raises OverflowError or struct.error out of range."""
        head = struct.pack("<I", self.type)
        if self.type is ValueType.STRING:
            return head + _packed_text(self.data)
        if self.type is not ValueType.ARRAY:
            return head + struct.pack("<" + _SCALARS[self.type], self.data)
        if self.element is None or self.element is ValueType.ARRAY:
            raise ValueError("an array of GGUF metadata holds scalars or strings")
        head += struct.pack("<IQ", self.element, len(self.data))
        if self.element is ValueType.STRING:
            packed = bytearray(head)
            for text in self.data:
                packed += _packed_text(text)
            return bytes(packed)
        return head + struct.pack(f"<{len(self.data)}{_SCALARS[self.element]}", *self.data)

    @property
    def nbytes(self) -> int:
        """Length of `pack`, without packing long arrays."""
        if self.type is not ValueType.ARRAY or self.element is None or self.element is ValueType.ARRAY:
            return len(self.pack())
        head = struct.calcsize("<IIQ")
        if self.element is ValueType.STRING:
            return head + 8 * len(self.data) + _text_bytes(self.data)
        return head + len(self.data) * struct.calcsize("<" + _SCALARS[self.element])


def _utf8(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def _text_bytes(texts: Sequence[Any]) -> int:
    try:
        return len("".join(texts).encode())
    except TypeError:  # some are bytes
        return len(b"".join(map(_utf8, texts)))


def uint32(number: int) -> Value:
    """An unsigned number: counts, lengths, token ids."""
    return Value(ValueType.UINT32, number)


def int32(number: int) -> Value:
    """A signed number."""
    return Value(ValueType.INT32, number)


def float32(number: float) -> Value:
    """A real number in single precision."""
    return Value(ValueType.FLOAT32, number)


def boolean(flag: bool) -> Value:
    """A truth value."""
    return Value(ValueType.BOOL, flag)


def string(text: str) -> Value:
    """A UTF-8 text."""
    return Value(ValueType.STRING, text)


def strings(texts: Sequence[str | bytes]) -> Value:
    """An array of UTF-8 texts."""
    return Value(ValueType.ARRAY, texts, ValueType.STRING)


def int32s(numbers: Sequence[int]) -> Value:
    """An array of signed numbers."""
    return Value(ValueType.ARRAY, numbers, ValueType.INT32)


def float32s(numbers: Sequence[float]) -> Value:
    """An array of real numbers in single precision."""
    return Value(ValueType.ARRAY, numbers, ValueType.FLOAT32)


def value_of(value: Any) -> Value:
    """The typed form of a plain value, by the conventions of llama.cpp's converter.

    bool, str and float keep their kind (floats in single precision), int becomes uint32, and an
    array of ints becomes int32. A numpy scalar or array keeps its own type. Raises TypeError for
    anything else, and for arrays that are empty or mixed.
    """
    if isinstance(value, Value):
        return value
    if type(value).__module__ == "numpy":  # asked by name: numpy need not be loaded to say no
        if isinstance(value, np.generic):
            return Value(_NUMPY[value.dtype.name], value.item())
        if isinstance(value, np.ndarray):
            return Value(ValueType.ARRAY, value.tolist(), _NUMPY[value.dtype.name])
    if isinstance(value, bool):
        return boolean(value)
    if isinstance(value, str):
        return string(value)
    if isinstance(value, int):
        return uint32(value)
    if isinstance(value, float):
        return float32(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes) and len(value):
        kinds = {type(item) for item in value}
        element = {bool: ValueType.BOOL, str: ValueType.STRING, int: ValueType.INT32, float: ValueType.FLOAT32}
        if len(kinds) == 1 and (kind := kinds.pop()) in element:
            return Value(ValueType.ARRAY, value, element[kind])
    raise TypeError(f"{value!r} has no form in GGUF metadata")


@dataclass(frozen=True)
class TensorEntry:
    """One line of the tensor table.

    shape   [rows, columns]; the file stores it reversed, columns first
    nbytes  bytes of its rows, padding excluded
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    nbytes: int


def padded(count: int) -> int:
    """`count` rounded up to the alignment."""
    return -(-count // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Container:
    """A GGUF file before its rows: all keys in file order, all tensors in file order."""

    metadata: Mapping[str, Value]
    tensors: tuple[TensorEntry, ...]

    @cached_property
    def header(self) -> bytes:
        """Everything before the first tensor's rows, padding included."""
        parts = [MAGIC, struct.pack("<IQQ", VERSION, len(self.tensors), len(self.metadata))]
        for key, value in self.metadata.items():
            parts += (_packed_text(key), value.pack())
        raw = b"".join((*parts, *self._lines()))
        return raw + bytes(padded(len(raw)) - len(raw))

    def _lines(self) -> Iterator[bytes]:
        """The lines of the tensor table."""
        offset = 0
        for tensor in self.tensors:
            dims = tensor.shape[::-1]
            line = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.ggml_type, offset)
            yield _packed_text(tensor.name) + line
            offset += padded(tensor.nbytes)

    @property
    def nbytes(self) -> int:
        """Exact size of the file."""
        return self.nbytes_with(0)

    def nbytes_with(self, more: int) -> int:
        """Exact size of the file with so many bytes more of keys."""
        head = struct.calcsize("<4sIQQ") + keys_nbytes(self.metadata) + more
        lines = sum(len(line) for line in self._lines())
        return padded(head + lines) + sum(padded(tensor.nbytes) for tensor in self.tensors)


def keys_nbytes(keys: Mapping[str, Value]) -> int:
    """Bytes of keys and their values."""
    return sum(len(_packed_text(key)) + value.nbytes for key, value in keys.items())
