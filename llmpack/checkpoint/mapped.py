"""Files mapped into memory for reading, and their pages given back when a block is done."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

from llmpack.checkpoint.safetensors_header import file_identity
from llmpack.errors import InputRejected, Problem

if TYPE_CHECKING:
    import numpy as np
else:
    from llmpack.lazy import LazyModule

    np = LazyModule("numpy")

_PAGE = mmap.PAGESIZE


class MappedFile:
    """One file, mapped at first use. The file must still be the one whose header was checked."""

    def __init__(self, path: Path, size: int, identity: tuple[int, int, int]) -> None:
        self.path = path
        self.size = size
        self._identity = identity
        self._map: mmap.mmap | None = None

    def map(self) -> mmap.mmap:
        """The whole file. Raises InputRejected (``changed``) if it is not the one that was checked."""
        if self._map is None:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_size != self.size or file_identity(status) != self._identity:
                    text = "the file changed after its header was checked; open the checkpoint again"
                    raise InputRejected([Problem(text, where=str(self.path), rule="changed")])
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map

    def view(self, offset: int, nbytes: int) -> np.ndarray:
        """uint8 [nbytes], read-only, without a copy."""
        if nbytes == 0:
            return np.empty(0, dtype=np.uint8)
        return np.frombuffer(self.map(), dtype=np.uint8, count=nbytes, offset=offset)

    def release(self, offset: int = 0, nbytes: int | None = None) -> None:
        """Drop the resident pages of a range from this process. Views stay valid and are read from disk again."""
        if self._map is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        start = offset // _PAGE * _PAGE
        stop = self.size if nbytes is None else offset + nbytes
        if stop > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def prefetch(self, offset: int, nbytes: int) -> None:
        """Let the system read a range ahead, into its cache of files."""
        if nbytes and hasattr(mmap, "MADV_WILLNEED"):
            start = offset // _PAGE * _PAGE
            self.map().madvise(mmap.MADV_WILLNEED, start, offset + nbytes - start)
