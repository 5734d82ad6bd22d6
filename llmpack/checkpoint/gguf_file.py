"""A GGUF file of a stranger, read strictly: versions 2 and 3, little-endian, nothing allocated beyond the file's size.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What llmpack accepts, llama.cpp's own container
reader accepts too; the reverse does not hold (holes, trailing bytes, empty tensors and odd names are refused here).
Rules: ``gguf-magic``, ``gguf-bounds``, ``gguf-tensor``, ``gguf-offset``, ``gguf-vocab``, ``config-range``,
``chat-template``, ``not-weights``.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from llmpack.checkpoint import gguf_types as t
from llmpack.checkpoint.gguf_metadata_reader import HeadReader, Strings
from llmpack.checkpoint.gguf_rules import value_problems
from llmpack.checkpoint.mapped import MappedFile
from llmpack.checkpoint.safetensors_header import file_identity
from llmpack.checkpoint.stand_in import stand_in
from llmpack.digest import CHUNK
from llmpack.errors import EnvironmentProblem, InputRejected, Problem
from llmpack.progress import QUIET, Progress

if TYPE_CHECKING:
    import numpy as np

__all__ = ["GgufFile", "GgufTensor", "Strings"]

_MOST_PROBLEMS = 20


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file.

    shape      in numpy order, [rows, columns] for matrices (the file stores it reversed)
    encoding   lower-case name of the ggml type ("q4_1"); whether llmpack decodes it is for ENCODINGS to say
    ggml_type  its number
    offset     absolute, in the file
    """

    name: str
    shape: tuple[int, ...]
    encoding: str
    ggml_type: int
    offset: int
    nbytes: int

    @property
    def rows(self) -> int:
        """Product of all sizes but the last; 1 for a vector."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True, eq=False)
class GgufFile:
    """The head of a file that passed every rule; tensors are mapped on demand.

    metadata  by key, in the order of the file: int, float, bool, str; arrays of numbers as read-only numpy arrays,
              arrays of strings as `Strings` (a Sequence that decodes what it is asked for)
    types     value type of each key: (type,) or (ARRAY, element type), numbers of `gguf_types`
    tensors   by name, in the order of the file
    """

    path: Path
    version: int
    alignment: int
    metadata: Mapping[str, Any]
    types: Mapping[str, tuple[int, ...]]
    tensors: Mapping[str, GgufTensor]
    data_offset: int
    size: int
    _file: MappedFile = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read and check the head. Raises InputRejected with the problems, EnvironmentProblem if there is no file."""
        mapped = _map(path)
        reader = HeadReader(str(path), mapped.map())
        version, tensor_count, key_count = reader.header()
        metadata, types = _read_metadata(reader, key_count)
        problems = [Problem(text, where=str(path), rule=rule) for rule, text in value_problems(metadata, types)]
        alignment = _alignment(reader, metadata, types)
        infos = [_read_info(reader, index) for index in range(tensor_count)]
        data_offset = -(-reader.position // alignment) * alignment
        tensors, wrong = _place(infos, data_offset, alignment, mapped.size)
        problems += [Problem(text, where=str(path), rule=rule) for rule, text in wrong]
        if problems:
            raise InputRejected(_shortened(problems, str(path)))
        return cls(
            path, version, alignment, MappingProxyType(metadata), MappingProxyType(types), MappingProxyType(tensors),
            data_offset, mapped.size, mapped,
        )  # fmt: skip

    def packed(self, name: str) -> np.ndarray:
        """uint8 [rows, bytes per row], read-only, mapped from the file. Raises KeyError for an unknown name."""
        tensor = self.tensors[name]
        return self._file.view(tensor.offset, tensor.nbytes).reshape(tensor.rows, -1)

    def release(self, names: Iterable[str] | None = None) -> None:
        """Drop the resident pages of these tensors (of the whole file for None) from this process."""
        if names is None:
            self._file.release()
            return
        for name in names:
            self._file.release(self.tensors[name].offset, self.tensors[name].nbytes)

    @property
    def encodings(self) -> dict[str, int]:
        """How many tensors there are of each encoding."""
        counts: dict[str, int] = {}
        for tensor in self.tensors.values():
            counts[tensor.encoding] = counts.get(tensor.encoding, 0) + 1
        return counts

    def digest(self, progress: Progress = QUIET) -> str:
        """Hex sha256 of the whole file."""
        digest = hashlib.sha256()
        with progress.task("hashing source", self.size) as done:
            for start in range(0, self.size, CHUNK):
                view = self._file.view(start, min(CHUNK, self.size - start))
                digest.update(view.data)
                self._file.release(start, len(view))
                done(len(view))
        return digest.hexdigest()


def _map(path: Path) -> MappedFile:
    """The file, if it can hold a model at all."""
    try:
        status = path.stat()
    except OSError as error:
        raise EnvironmentProblem(f"{path}: {error.strerror}") from error
    where = str(path)
    if not stat.S_ISREG(status.st_mode):
        raise InputRejected([Problem("not a regular file", where=where, rule="not-weights")])
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        reason = stand_in(path, file.read(64), status.st_size)
    if reason:
        raise InputRejected([Problem(reason, where=where, rule="not-weights")])
    return MappedFile(path, status.st_size, file_identity(status))


def _read_metadata(reader: HeadReader, count: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    metadata: dict[str, Any] = {}
    types: dict[str, tuple[int, ...]] = {}
    for index in range(count):
        key = reader.name(f"key {index}", t.MAX_KEY)
        if key in metadata:
            reader.reject("gguf-tensor", f"the key {key[:80]!r} stands twice")
        metadata[key], types[key] = reader.value(key)
    return metadata, types


def _alignment(reader: HeadReader, metadata: Mapping[str, Any], types: Mapping[str, tuple[int, ...]]) -> int:
    key = "general.alignment"
    if key not in metadata:
        return t.DEFAULT_ALIGNMENT
    value = metadata[key]
    if types[key] != (t.UINT32,):
        reader.reject("gguf-offset", f"{key} is not uint32")
    if value == 0 or value & (value - 1) or value > t.MAX_ALIGNMENT:
        reader.reject("gguf-offset", f"{key} {value} is not a power of two up to {t.MAX_ALIGNMENT}")
    return int(value)


@dataclass(frozen=True)
class _Info:
    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int


def _read_info(reader: HeadReader, index: int) -> _Info:
    name = reader.name(f"name of tensor {index}", t.MAX_NAME)
    dimensions = reader.u32(f"dimensions of {name}")
    if not 1 <= dimensions <= t.MAX_DIMENSIONS:
        reader.reject(
            "gguf-tensor", f"tensor {name!r} has {dimensions} dimensions; 1 to {t.MAX_DIMENSIONS} are allowed"
        )
    sizes = [reader.u64(f"shape of {name}") for _ in range(dimensions)]
    return _Info(name, tuple(reversed(sizes)), reader.u32(f"type of {name}"), reader.u64(f"offset of {name}"))


def _type_problem(info: _Info) -> str | None:
    kind = t.TENSOR_TYPES.get(info.ggml_type)
    if kind is None:
        return f"unknown ggml type {info.ggml_type}"
    if 0 in info.shape:
        return f"the shape {list(info.shape)} is empty"
    if math.prod(info.shape) >= 2**63:
        return f"the shape {list(info.shape)} has more numbers than can be counted in 63 bits"
    if info.shape[-1] % kind.block:
        return f"rows of {info.shape[-1]} are not a multiple of {kind.name}'s block of {kind.block}"
    return None


def _place(
    infos: Iterable[_Info], data_offset: int, alignment: int, size: int
) -> tuple[dict[str, GgufTensor], list[tuple[str, str]]]:
    """Tensors with their bytes. As llama.cpp demands, each begins where the one before it ends, padded."""
    tensors: dict[str, GgufTensor] = {}
    problems: list[tuple[str, str]] = []
    cursor, end, counted = 0, 0, True
    for info in infos:
        reason = _type_problem(info)
        if reason is None and info.name in tensors:
            reason = "the name stands twice"
        if reason is not None:
            problems.append(("gguf-tensor", f"tensor {info.name!r}: {reason}"))
            counted = False  # without its size, no later offset can be judged
            continue
        kind = t.TENSOR_TYPES[info.ggml_type]
        nbytes = math.prod(info.shape) // kind.block * kind.block_bytes
        if counted and info.offset != cursor:
            problems.append(("gguf-offset", f"tensor {info.name!r} has offset {info.offset}, expected {cursor}"))
        tensors[info.name] = GgufTensor(
            info.name, info.shape, kind.name, info.ggml_type, data_offset + info.offset, nbytes
        )
        end = max(end, info.offset + nbytes)
        cursor = -(-(info.offset + nbytes) // alignment) * alignment
    if not problems:
        problems += _extent_problems(data_offset + end if tensors else 0, data_offset + cursor, size)
    return tensors, problems


def _extent_problems(end: int, padded_end: int, size: int) -> Iterator[tuple[str, str]]:
    if end > size:
        yield "gguf-offset", f"expected {end} bytes, got {size}: the file was cut off; download or copy it again"
    elif size > padded_end:
        yield "gguf-offset", f"{size - padded_end} bytes after the last tensor"


def _shortened(problems: list[Problem], where: str) -> list[Problem]:
    if len(problems) <= _MOST_PROBLEMS:
        return problems
    rest = len(problems) - _MOST_PROBLEMS
    return [*problems[:_MOST_PROBLEMS], Problem(f"and {rest} more", where=where, rule=problems[-1].rule)]
