"""One safetensors file, streamed from bytes that may be mapped; the same tensors always give the same file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmpack.checkpoint.packed_metadata import packed_metadata
from llmpack.checkpoint.safetensors_header import DTYPE_BYTES, bad_name
from llmpack.checkpoint.tensors import Packed, chunks, is_plain

if TYPE_CHECKING:
    import numpy as np
else:
    from llmpack.lazy import LazyModule

    np = LazyModule("numpy")

_ALIGNMENT = 8


def nbytes_of(tensors: Mapping[str, Packed]) -> int:
    """Bytes of the whole file."""
    return len(_head(_in_order(tensors))) + sum(t.nbytes for t in tensors.values())


def write_safetensors(path: Path, tensors: Mapping[str, Packed]) -> dict[str, str]:
    """Write the file and return the hex sha256 of each tensor's bytes.

    Wide types come first, so that every number is aligned; within a type the order is that of the names. Blocks
    of codes are U8 [rows, bytes per row], explained by the metadata.
    Raises ValueError for a name that reading would refuse, OSError.
    """
    ordered = _in_order(tensors)
    for name in ordered:
        if (reason := bad_name(name)) is not None:
            raise ValueError(f"tensor {name!r}: {reason}")
    digests = {}
    with path.open("wb") as file:
        file.write(_head(ordered))
        for name, tensor in ordered.items():
            digest = hashlib.sha256()
            for rows in chunks(tensor.data):
                view = np.ascontiguousarray(rows).reshape(-1).data
                digest.update(view)
                file.write(view)
            digests[name] = digest.hexdigest()
    return dict(sorted(digests.items()))


def _dtype(tensor: Packed) -> tuple[str, tuple[int, ...]]:
    if is_plain(tensor.encoding):
        return tensor.encoding.upper(), tensor.shape
    return "U8", tuple(tensor.data.shape)


def _in_order(tensors: Mapping[str, Packed]) -> dict[str, Packed]:
    return dict(sorted(tensors.items(), key=lambda item: (-DTYPE_BYTES[_dtype(item[1])[0]], item[0])))


def _head(ordered: Mapping[str, Packed]) -> bytes:
    """Length and header, filled up with spaces so that the data begins at a multiple of 8."""
    packed = {name: (t.encoding, t.shape) for name, t in ordered.items() if not is_plain(t.encoding)}
    header: dict[str, object] = {"__metadata__": packed_metadata(packed)} if packed else {}
    offset = 0
    for name, tensor in ordered.items():
        dtype, shape = _dtype(tensor)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
