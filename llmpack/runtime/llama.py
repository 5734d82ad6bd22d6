"""LlamaRuntime: llama.cpp, which runs GGUF files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmpack.errors import RuntimeFailed
from llmpack.process import Child
from llmpack.runtime.meter import Memory
from llmpack.runtime.runtime import SILENCE_SECONDS, Build, Runtime


@dataclass(frozen=True)
class LlamaBuild(Build):
    """Which llama.cpp runs.

    commit       of llama.cpp's source
    version      of ggml
    system       the processor features that it was compiled for and found ("AVX2 = 1 | ...")
    """

    commit: str
    version: str
    system: str

    @property
    def versions(self) -> Mapping[str, str]:
        """The commit of llama.cpp and the version of ggml."""
        return {"llama.cpp": self.commit, "ggml": self.version}

    @property
    def features(self) -> tuple[str, ...]:
        """The features that are on, as llama.cpp spells them."""
        pairs = (part.rpartition(":")[2].partition("=") for part in self.system.split("|"))
        return tuple(name.strip() for name, _, value in pairs if value.strip() not in ("", "0"))


def _build_of(answer: Mapping[str, Any]) -> LlamaBuild:
    return LlamaBuild(**{**answer, "bare_memory": Memory(**answer["bare_memory"])})


def crash_hint(features: Collection[str]) -> str:
    """What to try where llama.cpp with these features crashes, or nothing.

    GCC 12, for one, drops most of the setup of AMX tiles as unused (ggml-org/llama.cpp pull request 26954), and the
    first product of matrices ends with SIGSEGV.
    """
    if not any(name.startswith("AMX") for name in features):
        return ""
    flags = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    return (
        "\n  this llama.cpp uses AMX, which some compilers build wrong; without it: "
        f'CFLAGS="{flags}" CXXFLAGS="{flags}" pip install --force-reinstall --no-cache-dir --no-deps llama-cpp-python'
    )


class LlamaRuntime(Runtime):
    """A child process with llama.cpp in it.

    >>> with LlamaRuntime() as runtime:
    ...     runtime.open(Path("model.gguf"), RuntimeSettings(), context=512)
    ...     logits = runtime.logits(tokens)
    """

    title = "llama.cpp"
    module, package, extra = "llama_cpp", "llama-cpp-python", "run"
    packages = ("llama-cpp-python",)
    worker = "llmpack.runtime.llama_worker"

    @classmethod
    def _crash_hint(cls) -> str:
        with Child(cls.worker, title=cls.title) as other:  # a bare child: its own crash asks for no hint
            try:
                return crash_hint(_build_of(other.ask("info", {}, SILENCE_SECONDS)).features)
            except RuntimeFailed:
                return ""

    def check(self, path: Path) -> None:
        """A GGUF file is one file."""
        if not path.is_file():
            raise RuntimeFailed(f"llama.cpp: {path} is not a file", kind="refused")

    def info(self) -> LlamaBuild:
        """Which llama.cpp this is."""
        return _build_of(self._ask("info"))

    def quantize_rows(
        self, weight: np.ndarray, ggml_type: int, importance: np.ndarray | None = None, *, threads: int = 1
    ) -> np.ndarray:
        """llama.cpp's own rounding of `weight` [rows, columns] float32; [rows, row bytes] uint8.

        importance  [columns] float32, mean squared input of each column (an "imatrix"), or None
        threads     share the rows; the bytes do not depend on it

        Source: ggml_quantize_chunk in ggml.h. Raises RuntimeFailed also where a type needs importance.
        """
        rows, columns = weight.shape
        facts = self._ask("row_bytes", ggml_type=ggml_type, columns=columns)
        if facts["needs_importance"] and importance is None:
            raise RuntimeFailed(f"llama.cpp cannot round to ggml type {ggml_type} without importance", kind="refused")
        inputs = [np.ascontiguousarray(weight, np.float32)]
        if importance is not None:
            if importance.shape != (columns,):
                raise ValueError(f"importance has shape {importance.shape}, the weight {columns} columns")
            inputs.append(np.ascontiguousarray(importance, np.float32))
        head, row_bytes = sum(array.nbytes for array in inputs), int(facts["row_bytes"])
        path = self._shared_file(head + rows * row_bytes)
        try:
            shared = np.memmap(path, np.uint8, "r+")
            offset = 0
            for array in inputs:
                shared[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
                offset += array.nbytes
            self._ask(
                "quantize_rows", rows=rows, columns=columns, ggml_type=ggml_type,
                importance=importance is not None, file=str(path), threads=max(1, min(threads, rows)),
            )  # fmt: skip
            return np.array(shared[head:]).reshape(rows, row_bytes)
        finally:
            path.unlink()
