"""llama.cpp's C library inside the worker: loaded lean, its log kept.

``import llama_cpp`` brings numpy, jinja2 and more, some 25 MiB that the measured process would carry
for nothing; the bindings alone need ctypes only. So a bare package stands in for it until the whole
one is asked for (`whole_package`, for chat templates).
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
import sys
from collections import deque
from types import ModuleType
from typing import Any

from llmpack.runtime.conversation import RefusedError

_BUFFER = re.compile(r"(\S+)\s+(model|KV|compute|output|RS) buffer size\s*=\s*([\d.]+) MiB")
_LOAD_MODE = re.compile(r"\(load_mode = ([\w+]+)\)")
_KEPT_LINES = 2000
_LEVEL_DEBUG, _LEVEL_ERROR, _LEVEL_CONTINUED = 1, 4, 5
"""Of ggml.h; `llama_cpp._logger` has an older table."""


def bare_bindings() -> Any:
    """The module ``llama_cpp.llama_cpp`` without the rest of its package."""
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.submodule_search_locations is None:
        raise RefusedError("the Python package `llama_cpp` is not installed for the worker's interpreter")
    bare = ModuleType("llama_cpp")
    bare.__path__ = list(found.submodule_search_locations)
    sys.modules["llama_cpp"] = bare
    return importlib.import_module("llama_cpp.llama_cpp")


class Library:
    """The loaded library: `api` holds the functions of llama.h, `ggml` those of ggml.h that llmpack needs."""

    def __init__(self) -> None:
        self.api = bare_bindings()
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._errors: deque[str] = deque(maxlen=_KEPT_LINES)
        self._level = 0
        self._callback = self.api.llama_log_callback(self._heard)  # must live as long as the library
        self.api.llama_log_set(self._callback, ctypes.c_void_p(0))
        self.api.llama_backend_init()
        self.ggml = self._open_ggml()

    def _open_ggml(self) -> Any:
        loader = importlib.import_module("llama_cpp._ctypes_extensions")
        folder = importlib.import_module("llama_cpp._ggml").libggml_base_path
        ggml = loader.load_shared_library("ggml-base", folder)
        ggml.ggml_commit.restype = ggml.ggml_version.restype = ctypes.c_char_p
        ggml.ggml_row_size.argtypes, ggml.ggml_row_size.restype = [ctypes.c_int, ctypes.c_int64], ctypes.c_size_t
        ggml.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
        ggml.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
        row, pointer = ctypes.c_int64, ctypes.c_void_p
        ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, row, row, row, pointer]
        ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
        return ggml

    def _heard(self, level: int, text: bytes, _data: Any) -> None:
        """Keep and show what llama.cpp says, without its debug lines (thousands in a load)."""
        if level != _LEVEL_CONTINUED:
            self._level = level
        if self._level == _LEVEL_DEBUG:
            return
        line = text.decode("utf-8", "replace")
        self._lines.append(line)
        if self._level >= _LEVEL_ERROR:
            self._errors.append(line)
        sys.stderr.write(line)

    def forget_log(self) -> None:
        """Begin a new log, so that what is read from it belongs to the next call."""
        self._lines.clear()
        self._errors.clear()

    @property
    def log(self) -> str:
        """What was said since `forget_log`, its last 2000 lines at most."""
        return "".join(self._lines)

    def errors(self) -> str:
        """What llama.cpp logged as errors since `forget_log`: the first three lines, which are nearest to the cause."""
        lines = dict.fromkeys(line.strip() for line in "".join(self._errors).splitlines() if line.strip())
        return "; ".join(list(lines)[:3]) or "it gave no reason"

    def logged_buffers(self) -> dict[str, int]:
        """Bytes of each buffer by ``"kind.place"`` ("model.CPU_Mapped", "KV.CPU", ...), as llama.cpp reports them."""
        sizes: dict[str, int] = {}
        for place, kind, mebibytes in _BUFFER.findall(self.log):
            name = f"{kind}.{place}"
            sizes[name] = sizes.get(name, 0) + round(float(mebibytes) * (1 << 20))
        return sizes

    def logged_load_mode(self) -> str:
        """ "mmap", "none", ... as llama.cpp says it loaded."""
        found = _LOAD_MODE.findall(self.log)
        return found[-1] if found else ""

    def logged_flash_attention(self, asked: str) -> str:
        """ "on" or "off": what was asked, or what "auto" came to."""
        if asked != "auto":
            return asked
        return "on" if re.search(r"Flash Attention enabled|enabling flash_attn", self.log) else "off"

    def whole_package(self) -> ModuleType:
        """Import ``llama_cpp`` in full; the bindings that are loaded already stay the same."""
        if "llama_cpp.llama_chat_format" not in sys.modules:
            del sys.modules["llama_cpp"]
            importlib.import_module("llama_cpp")
            self.api.llama_log_set(self._callback, ctypes.c_void_p(0))  # the package sets its own at import
        return importlib.import_module("llama_cpp.llama_chat_format")
