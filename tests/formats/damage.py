"""Wrong GGUF files: what a family would have written if one thing about it were wrong, patched in place."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.formats.gguf_container import ValueType

NUMBERS = {ValueType.UINT32: "<I", ValueType.FLOAT32: "<f"}
FLOATS = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2")}

Patch = Callable[["Patched"], None]


class Patched:
    """A copy of a GGUF file, open for writing."""

    def __init__(self, original: Path, copy: Path) -> None:
        shutil.copyfile(original, copy)
        self.path, self.file = copy, GgufFile.open(original)
        self.raw = np.memmap(copy, np.uint8, "r+")

    def set(self, key: str, value: float) -> None:
        """Another number under a key of the architecture."""
        whole = f"{self.file.metadata['general.architecture']}.{key}".encode()
        name = struct.pack("<Q", len(whole)) + whole
        end = bytes(self.raw[: self.file.data_offset]).index(name) + len(name)
        (kind,) = struct.unpack_from("<I", self.raw, end)
        packed = struct.pack(NUMBERS[ValueType(kind)], value)
        assert bytes(self.raw[end + 4 : end + 4 + len(packed)]) != packed, f"{key} is {value} already"
        self.raw[end + 4 : end + 4 + len(packed)] = np.frombuffer(packed, np.uint8)

    def tensor(self, name: str) -> np.ndarray:
        """A tensor of floats, to be written to."""
        found = self.file.tensors[name]
        stretch = self.raw[found.offset : found.offset + found.nbytes]
        return stretch.view(FLOATS[found.encoding]).reshape(found.shape)

    def of_every_block(self, name: str) -> list[np.ndarray]:
        """The tensors of that name, block by block."""
        return [self.tensor(f"blk.{i}.{name}") for i in range(self.file.metadata[self._key("block_count")])]

    def _key(self, key: str) -> str:
        return f"{self.file.metadata['general.architecture']}.{key}"


def number(key: str, value: float) -> Patch:
    """Another number in the metadata."""
    return lambda patched: patched.set(key, value)


def filled(names: tuple[str, ...], value: float) -> Patch:
    """Tensors of every block with one number in every place: 1 drops a norm's weights, 0 a bias."""

    def patch(patched: Patched) -> None:
        for name in names:
            for values in patched.of_every_block(name):
                values[:] = value

    return patch


def shifted(by: float) -> Patch:
    """Every norm with something added."""

    def patch(patched: Patched) -> None:
        for name in patched.file.tensors:
            if name.endswith("_norm.weight"):
                patched.tensor(name)[:] += by

    return patch


def exchanged(one: str, other: str) -> Patch:
    """Two tensors of every block in each other's place."""

    def patch(patched: Patched) -> None:
        for a, b in zip(patched.of_every_block(one), patched.of_every_block(other), strict=True):
            a[:], b[:] = b.copy(), a.copy()

    return patch


def rows(name: str, order: Callable[[np.ndarray], np.ndarray]) -> Patch:
    """The rows of a tensor of every block in another order."""

    def patch(patched: Patched) -> None:
        for values in patched.of_every_block(name):
            values[:] = values[order(np.arange(len(values)))]

    return patch


def interleaved(names: tuple[str, ...], head_dim: int, *, back: bool = False) -> Patch:
    """The halves of every head interleaved, as Llama has them in GGUF, or undone."""

    def order(numbers: np.ndarray) -> np.ndarray:
        pairs = numbers.reshape(-1, head_dim // 2, 2) if back else numbers.reshape(-1, 2, head_dim // 2)
        return pairs.swapaxes(1, 2).reshape(-1)

    def patch(patched: Patched) -> None:
        for name in names:
            rows(name, order)(patched)

    return patch


def halves_exchanged(numbers: np.ndarray) -> np.ndarray:
    """The second half first."""
    return np.roll(numbers, len(numbers) // 2)
