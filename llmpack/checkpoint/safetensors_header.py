"""The header of a safetensors file, checked before a byte of data is touched.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, a JSON object,
then the data). This reader is stricter than the library: keys that stand twice, control characters
or ``..`` in names, white space before the object and unknown fields are refused.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpack.checkpoint.stand_in import stand_in
from llmpack.checkpoint.strict_json import parse_json
from llmpack.errors import InputRejected, Problem

MAX_HEADER = 100_000_000
MAX_TENSORS = 1_000_000
MAX_DIMENSIONS = 8
MAX_NAME = 512
RULE = "safetensors-header"

# dtype as the header spells it: bytes of one number
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "F32": 4,
    "I64": 8,
    "F64": 8,
}
# valid in the format, but llmpack has no use for them
_FOREIGN = ("F8_E5M2", "F8_E4M3", "F8_E8M0", "F6_E2M3", "F6_E3M2", "F4", "U16", "U32", "U64", "C64")


@dataclass(frozen=True)
class HeaderTensor:
    """One entry: dtype as spelled in the file, shape, absolute offset and length in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """All entries of one file in the order of the header, its metadata, and the identity of what was read.

    size      bytes of the whole file
    identity  (device, inode, modification time in ns), so that a change before mapping is noticed
    """

    path: Path
    tensors: Mapping[str, HeaderTensor]
    metadata: Mapping[str, str]
    size: int
    identity: tuple[int, int, int]


def bad_name(name: str) -> str | None:
    """Why a tensor name is refused, or None."""
    if not name or len(name) > MAX_NAME:
        return f"a name of {len(name)} characters (1 to {MAX_NAME} are allowed)"
    if not name.isprintable():
        return "a name with control or invisible characters"
    if ".." in name:
        return "a name with `..`"
    return None


def file_identity(status: os.stat_result) -> tuple[int, int, int]:
    """What stays equal as long as nobody replaces or rewrites the file."""
    return status.st_dev, status.st_ino, status.st_mtime_ns


def read_header(path: Path) -> Header:
    """Read and check the header of one file.

    Raises InputRejected with every problem; rules: ``not-weights``, ``safetensors-header``, ``truncated``.
    """
    where = str(path)
    with open(path, "rb", opener=_open_plainly) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise InputRejected([Problem("not a regular file", where=where, rule="not-weights")])
        head = file.read(64)
        reason = stand_in(path, head, status.st_size)
        if reason:
            raise InputRejected([Problem(reason, where=where, rule="not-weights")])
        length = _header_length(where, head, status.st_size)
        file.seek(8)
        raw = file.read(length)
    entries, metadata = _parse(where, raw)
    start = 8 + length
    tensors, problems = _check_entries(where, entries, start)
    if not problems:
        problems = _check_layout(where, tensors, start, status.st_size)
    if problems:
        raise InputRejected(problems)
    return Header(path, tensors, metadata, status.st_size, file_identity(status))


def _open_plainly(path: str, flags: int) -> int:
    """Open without waiting on a pipe that somebody put there."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _reject(where: str, message: str) -> InputRejected:
    return InputRejected([Problem(message, where=where, rule=RULE)])


def _header_length(where: str, head: bytes, size: int) -> int:
    if size < 8:
        raise _reject(where, f"{size} bytes are too few for a safetensors file (its first 8 give the header length)")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER:
        raise _reject(where, f"the header claims {length} bytes; at most {MAX_HEADER} are allowed (is it safetensors?)")
    if length < 2 or 8 + length > size:
        raise _reject(where, f"the header claims {length} bytes in a file of {size}")
    return length


def _parse(where: str, raw: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    if not raw.startswith(b"{"):
        raise _reject(where, "the header does not begin with `{`")
    try:
        entries = parse_json(raw.rstrip(b" "), max_depth=4)
    except ValueError as error:
        raise _reject(where, f"header: {error}") from error
    if not isinstance(entries, dict):
        raise _reject(where, "the header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _reject(where, "`__metadata__` is not a table of texts")
    if len(entries) > MAX_TENSORS:
        raise _reject(where, f"{len(entries)} tensors; at most {MAX_TENSORS} are allowed")
    return entries, metadata


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _entry_problem(name: str, entry: Any) -> str | None:
    """Why one entry is refused, or None."""
    if (reason := bad_name(name)) is not None:
        return reason
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "an entry has exactly dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype in _FOREIGN:
        return f"dtype {dtype} is not one that llmpack reads ({', '.join(DTYPE_BYTES)}); convert the tensor first"
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        return f"unknown dtype {str(dtype)[:40]!r}"
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, shape)):
        return f"shape {str(shape)[:80]} is not a list of at most {MAX_DIMENSIONS} sizes"
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(map(_is_count, offsets))
        or offsets[0] > offsets[1]
    ):
        return f"data_offsets {str(offsets)[:80]} is not [begin, end]"
    need = math.prod(shape) * DTYPE_BYTES[dtype]
    if need != offsets[1] - offsets[0]:
        return f"{dtype} {shape} needs {need} bytes, data_offsets give it {offsets[1] - offsets[0]}"
    return None


def _check_entries(where: str, entries: Mapping[str, Any], start: int) -> tuple[dict[str, HeaderTensor], list[Problem]]:
    tensors: dict[str, HeaderTensor] = {}
    problems = []
    for name, entry in entries.items():
        reason = _entry_problem(name, entry)
        if reason:
            problems.append(Problem(f"tensor {name[:80]!r}: {reason}", where=where, rule=RULE))
            continue
        begin, end = entry["data_offsets"]
        tensors[name] = HeaderTensor(entry["dtype"], tuple(entry["shape"]), start + begin, end - begin)
    return tensors, problems


def _check_layout(where: str, tensors: Mapping[str, HeaderTensor], start: int, size: int) -> list[Problem]:
    """Every byte of the data belongs to exactly one tensor."""
    problems = []
    cursor = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset < cursor:
            problems.append(Problem(f"tensor {name!r} overlaps the one before it", where=where, rule=RULE))
        elif tensor.offset > cursor:
            hole = tensor.offset - cursor
            problems.append(Problem(f"a hole of {hole} bytes before tensor {name!r}", where=where, rule=RULE))
        cursor = max(cursor, tensor.offset + tensor.nbytes)
    if cursor > size:
        text = f"expected {cursor} bytes, got {size}: the file was cut off; download or copy it again"
        problems.append(Problem(text, where=where, rule="truncated"))
    elif cursor < size and not problems:
        problems.append(Problem(f"{size - cursor} bytes after the last tensor", where=where, rule=RULE))
    return problems
