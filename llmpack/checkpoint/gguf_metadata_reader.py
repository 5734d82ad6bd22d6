"""Reads the head of a GGUF file: every count is held against the bytes that are left before anything is built."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, overload

from llmpack.checkpoint import gguf_types as t
from llmpack.errors import InputRejected, Problem

if TYPE_CHECKING:
    import numpy as np
else:
    from llmpack.lazy import LazyModule

    np = LazyModule("numpy")

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class Strings(Sequence[str]):
    """An array of strings in a mapped file; each is decoded when it is asked for, all were checked to be UTF-8."""

    def __init__(self, data: mmap.mmap, starts: np.ndarray) -> None:
        self._data = data
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self.raw(int(start)).decode() for start in self._starts[index]]
        return self.raw(int(self._starts[index])).decode()

    def __iter__(self) -> Iterator[str]:
        for start in self._starts.tolist():
            yield self.raw(start).decode()

    def __repr__(self) -> str:
        return f"<{len(self)} strings>"

    def raw(self, start: int) -> bytes:
        """Bytes of the string whose length stands at `start`."""
        (length,) = _U64.unpack_from(self._data, start)
        return self._data[start + 8 : start + 8 + length]

    def all_bytes(self) -> Iterator[bytes]:
        """Every string as bytes."""
        for start in self._starts.tolist():
            yield self.raw(start)


class HeadReader:
    """A position in a mapped GGUF file. Methods raise InputRejected where the file does not hold what it claims."""

    def __init__(self, where: str, data: mmap.mmap) -> None:
        self._where = where
        self._data = data
        self._size = len(data)
        self.position = 0

    def reject(self, rule: str, message: str) -> NoReturn:
        """Refuse the file."""
        raise InputRejected([Problem(message, where=self._where, rule=rule)])

    def need(self, count: int, width: int, what: str) -> int:
        """Position of `count` items of `width` bytes, stepped over; refused if fewer bytes are left."""
        left = self._size - self.position
        if count * width > left:
            self.reject("gguf-bounds", f"{what}: {count} x {width} bytes at byte {self.position}, {left} are left")
        start = self.position
        self.position += count * width
        return start

    def u32(self, what: str) -> int:
        """An unsigned 32-bit number."""
        return int(_U32.unpack_from(self._data, self.need(1, 4, what))[0])

    def u64(self, what: str) -> int:
        """An unsigned 64-bit number."""
        return int(_U64.unpack_from(self._data, self.need(1, 8, what))[0])

    def text(self, what: str) -> str:
        """A string in UTF-8."""
        length = self.u64(f"length of {what}")
        start = self.need(length, 1, what)
        try:
            return self._data[start : start + length].decode()
        except UnicodeDecodeError:
            self.reject("gguf-bounds", f"{what} at byte {start} is not UTF-8")

    def name(self, what: str, longest: int) -> str:
        """A key or the name of a tensor: short, not empty, printable."""
        name = self.text(what)
        if not name or len(name.encode()) > longest or not name.isprintable():
            self.reject("gguf-bounds", f"{what} {name[:80]!r} is empty, longer than {longest} bytes or not printable")
        return name

    def header(self) -> tuple[int, int, int]:
        """(version, number of tensors, number of metadata keys)."""
        start = self.need(4, 1, "magic")
        magic = self._data[start : start + 4]
        if magic != t.MAGIC:
            self.reject("gguf-magic", f"the file begins with {magic!r}, not {t.MAGIC!r}; it is not GGUF")
        version = self.u32("version")
        if version not in t.VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            reason = "big-endian, which is not read" if swapped in t.VERSIONS else "one of 2 and 3 is read"
            self.reject("gguf-magic", f"GGUF version {version}: {reason}")
        tensors, keys = self.u64("number of tensors"), self.u64("number of keys")
        left = self._size - self.position
        for count, least, what in ((tensors, 25, "tensors"), (keys, 13, "keys")):
            if count * least > left or count > t.MAX_ENTRIES:
                self.reject("gguf-bounds", f"{count} {what} in {left} bytes (at most {t.MAX_ENTRIES} are allowed)")
        return version, tensors, keys

    def value(self, key: str) -> tuple[Any, tuple[int, ...]]:
        """A metadata value and its type: (type,) or (ARRAY, element type).

        Arrays of numbers are read-only numpy arrays, arrays of strings are `Strings`.
        """
        kind = self.u32(f"type of {key}")
        if kind == t.ARRAY:
            element = self.u32(f"element type of {key}")
            if element == t.ARRAY:
                self.reject("gguf-bounds", f"{key}: arrays of arrays are not read")
            return self._array(key, element, self.u64(f"length of {key}")), (kind, element)
        if kind == t.STRING:
            return self.text(key), (kind,)
        number = self._numbers(key, kind, 1)[0].item()
        return number, (kind,)

    def _array(self, key: str, kind: int, count: int) -> Any:
        if kind == t.STRING:
            return self._strings(key, count)
        return self._numbers(key, kind, count)

    def _numbers(self, key: str, kind: int, count: int) -> np.ndarray:
        if kind not in t.NUMBERS:
            self.reject("gguf-bounds", f"{key}: unknown value type {kind}")
        dtype = np.dtype("<" + t.NUMBERS[kind])
        start = self.need(count, dtype.itemsize, key)
        values = np.empty(0, dtype) if count == 0 else np.frombuffer(self._data, dtype, count, start)
        if kind != t.BOOL:
            return values
        if count and values.max() > 1:
            self.reject("gguf-bounds", f"{key}: a truth value is neither 0 nor 1")
        return values.view(np.bool_)

    def _strings(self, key: str, count: int) -> Strings:
        left = self._size - self.position
        if count * 8 > left or count > t.MAX_STRINGS:
            self.reject("gguf-bounds", f"{key}: {count} strings in {left} bytes (at most {t.MAX_STRINGS} are allowed)")
        starts = np.empty(count, dtype=np.uint64)
        data, size, position, unpack = self._data, self._size, self.position, _U64.unpack_from
        for index in range(count):
            starts[index] = position
            if position + 8 > size:
                self.reject("gguf-bounds", f"{key}: the file ends before string {index} of {count}")
            (length,) = unpack(data, position)
            position += 8 + length
            if position > size:
                self.reject("gguf-bounds", f"{key}: string {index} of {length} bytes runs beyond the file")
            try:
                data[position - length : position].decode()
            except UnicodeDecodeError:
                self.reject("gguf-bounds", f"{key}: string {index} is not UTF-8")
        self.position = position
        return Strings(data, starts)
