"""Which runtime runs a model: llama.cpp a GGUF file, transformers a folder."""

from __future__ import annotations

from pathlib import Path

from llmpack.runtime.llama import LlamaRuntime
from llmpack.runtime.runtime import Runtime
from llmpack.runtime.transformers_runtime import TransformersRuntime


def runtime_for(path: Path) -> type[Runtime]:
    """The runtime of a model file or folder."""
    return TransformersRuntime if path.is_dir() else LlamaRuntime
