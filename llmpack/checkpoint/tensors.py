"""What a stored tensor is, and how its bytes become numbers and digests."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmpack.checkpoint.safetensors_header import DTYPE_BYTES
from llmpack.encodings import ENCODINGS, encoding

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    from llmpack.lazy import LazyModule

    np = LazyModule("numpy")
    torch = LazyModule("torch")

CHUNK = 8 << 20

# numbers stored one by one: name of the encoding, dtype in safetensors (and of torch)
_TORCH_NAMES = {
    "bool": "bool",
    "u8": "uint8",
    "i8": "int8",
    "i16": "int16",
    "f16": "float16",
    "bf16": "bfloat16",
    "i32": "int32",
    "f32": "float32",
    "i64": "int64",
    "f64": "float64",
}
# bits of the exponent: all ones mean infinity or NaN
_EXPONENT = {"f16": ("<u2", 0x7C00), "bf16": ("<u2", 0x7F80), "f32": ("<u4", 0x7F800000), "f64": ("<u8", 0x7FF << 52)}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and how it is stored.

    encoding  a name in ENCODINGS, or of a plain integer type ("i64", "u8", ...)
    shape     logical shape: of the numbers, not of the bytes
    offset    absolute, in `file`
    """

    name: str
    encoding: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Packed:
    """A tensor as bytes.

    shape  logical shape
    data   uint8 [rows, bytes per row]; rows is the product of all sizes but the last (1 for vectors)
    """

    encoding: str
    shape: tuple[int, ...]
    data: np.ndarray

    def __post_init__(self) -> None:
        expected = byte_shape(self.encoding, self.shape)
        if self.data.dtype != np.uint8 or self.data.shape != expected:
            raise ValueError(
                f"{self.encoding} {self.shape} is stored as uint8 {expected}, got {self.data.dtype} {self.data.shape}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return int(self.data.nbytes)


def is_plain(name: str) -> bool:
    """True where each number is stored by itself (floats and integers), False for blocks of codes."""
    return name in _TORCH_NAMES


def known(name: str) -> bool:
    """True for every encoding that a checkpoint may hold."""
    return is_plain(name) or name in ENCODINGS


def byte_shape(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, bytes per row) of a tensor; a scalar is one row of one number.

    Raises ValueError where the row does not fit the blocks of the encoding.
    """
    rows, columns = (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)
    if is_plain(name):
        return rows, columns * DTYPE_BYTES[name.upper()]
    return rows, encoding(name).row_bytes(columns)


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of numbers that are stored one by one."""
    dtype: torch.dtype = getattr(torch, _TORCH_NAMES[name])
    return dtype


def encoding_of(dtype: torch.dtype) -> str:
    """Inverse of `torch_dtype`. Raises ValueError for a dtype that is not stored."""
    name = str(dtype).removeprefix("torch.")
    for ours, theirs in _TORCH_NAMES.items():
        if theirs == name:
            return ours
    raise ValueError(f"tensors of {dtype} are not stored; known: {', '.join(_TORCH_NAMES.values())}")


def decode(packed: np.ndarray, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A new tensor of logical shape: the stored dtype for plain numbers, float32 for blocks of codes."""
    if not is_plain(name):
        return encoding(name).decode(packed, shape[-1]).reshape(shape)
    tensor = torch.empty(shape, dtype=torch_dtype(name))
    if tensor.numel():
        tensor.reshape(-1).view(torch.uint8).numpy()[:] = packed.reshape(-1)
    return tensor


def as_packed(tensor: torch.Tensor) -> Packed:
    """The bytes of a torch tensor, without a copy where it lies contiguous in memory."""
    name, shape = encoding_of(tensor.dtype), tuple(tensor.shape)
    plain = tensor.detach().cpu().contiguous()
    data = plain.reshape(-1).view(torch.uint8).numpy() if plain.numel() else np.empty(0, dtype=np.uint8)
    return Packed(name, shape, data.reshape(byte_shape(name, shape)))


def chunks(packed: np.ndarray, nbytes: int = CHUNK) -> Iterator[np.ndarray]:
    """Runs of whole rows of about `nbytes`, at least one row each."""
    rows, row_bytes = packed.shape
    step = max(1, nbytes // max(1, row_bytes))
    for start in range(0, rows, step):
        yield packed[start : start + step]


def digest_of(packed: np.ndarray) -> str:
    """Hex sha256 of the bytes."""
    digest = hashlib.sha256()
    for chunk in chunks(packed):
        digest.update(np.ascontiguousarray(chunk).data)
    return digest.hexdigest()


def finite(packed: np.ndarray, name: str, columns: int) -> bool:
    """True if no number in these rows is infinite or NaN. Looks at exponents, so that no float is made."""
    if name in _EXPONENT:
        kind, mask = _EXPONENT[name]
        bits = np.ascontiguousarray(packed).reshape(-1).view(kind)
        return not bool(np.any((bits & np.array(mask, dtype=kind)) == np.array(mask, dtype=kind)))
    if is_plain(name):
        return True
    return bool(torch.isfinite(encoding(name).decode(packed, columns)).all())
