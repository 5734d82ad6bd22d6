"""TransformersRuntime: transformers, which runs model folders of safetensors files."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmpack.checkpoint.config_intake import quantization_method
from llmpack.checkpoint.strict_json import parse_json
from llmpack.errors import MissingExtra, RuntimeFailed
from llmpack.gpu import torch_with_gpu
from llmpack.runtime.meter import Memory
from llmpack.runtime.runtime import Build, Runtime
from llmpack.runtime.settings import RuntimeSettings

KERNELS = {"bitsandbytes": ("bitsandbytes", "nf4"), "gptq": ("gptqmodel", "gptq")}
"""Method of a ``quantization_config``: the package whose kernels run it, and the extra that brings the package."""


def require_processor(settings: RuntimeSettings) -> None:
    """Raises EnvironmentProblem where a GPU is asked for and torch, imported for that alone, finds none."""
    if settings.processor == "cuda":
        torch_with_gpu("runtime.processor")


@dataclass(frozen=True)
class TransformersBuild(Build):
    """Which transformers runs.

    libraries  versions of transformers, torch and what computes beside them, by name
    """

    libraries: Mapping[str, str]

    @property
    def versions(self) -> Mapping[str, str]:
        """The libraries."""
        return dict(self.libraries)


class TransformersRuntime(Runtime):
    """A child process with transformers in it: the folder is loaded by plain ``AutoModelForCausalLM.from_pretrained``.

    >>> with TransformersRuntime() as runtime:
    ...     runtime.open(Path("bundle"), RuntimeSettings(), context=512)
    ...     logits = runtime.logits(tokens)
    """

    title = "transformers"
    module, package, extra = "transformers", "transformers", "build"
    packages = ("transformers", "torch", "tokenizers", "bitsandbytes", "gptqmodel")
    worker = "llmpack.runtime.transformers_worker"

    def check(self, path: Path) -> None:
        """A model is a folder with a config; what its weights are quantized by must be installed."""
        config = path / "config.json"
        if not config.is_file():
            raise RuntimeFailed(f"transformers: {path} is no model folder (config.json is missing)", kind="refused")
        try:
            method = quantization_method(parse_json(config.read_bytes()))
        except ValueError as fault:
            raise RuntimeFailed(f"transformers: {config}: {fault}", kind="refused") from fault
        if method in KERNELS and importlib.util.find_spec(KERNELS[method][0]) is None:
            raise MissingExtra(*KERNELS[method])

    def info(self) -> TransformersBuild:
        """Which libraries these are."""
        answer = self._ask("info")
        return TransformersBuild(Memory(**answer["bare_memory"]), answer["libraries"])
