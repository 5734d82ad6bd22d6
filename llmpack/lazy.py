"""Modules that load at their first use, so that `llmpack plan` and `--help` never pay for torch."""

from __future__ import annotations

import importlib
from typing import Any

from llmpack.torchvision_operators import declare_operators


class LazyModule:
    """Stands for a module until an attribute of it is asked for.

    Used as ``torch = LazyModule("torch")`` beside ``if TYPE_CHECKING: import torch``. A missing
    package becomes a `MissingExtra` that names the extra which brings it.
    """

    def __init__(self, name: str, extra: str = "build") -> None:
        self._name = name
        self._extra = extra

    def __getattr__(self, attribute: str) -> Any:
        if self._name == "transformers":
            declare_operators()
        try:
            module = importlib.import_module(self._name)
        except ModuleNotFoundError as missing:
            if missing.name is None or missing.name.split(".")[0] != self._name.split(".")[0]:
                raise
            from llmpack.errors import MissingExtra

            raise MissingExtra(self._name, self._extra) from missing
        self.__dict__.update(module.__dict__)
        return getattr(module, attribute)
