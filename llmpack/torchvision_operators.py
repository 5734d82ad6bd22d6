"""Makes torchvision importable beside a torch for processors, for programs that only import it.

GPTQModel wants torchvision for one model that sees, and transformers imports it wherever it is installed. Its wheel as
PyPI has it is built for CUDA: beside a torch for processors its library does not load, and the import ends at operators
that the library would have defined.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from typing import Any

OPERATORS = ("nms", "qnms")
"""Those that the import looks for, of equal arguments."""


@cache
def declare_operators() -> Any:
    """Import torchvision, if it is there; the operators that its import asks for are declared where they are missing.

    What is declared has a name and no code: an image model that calls it is told so by torch. Gives back what must be
    kept for operators to stay, or None.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except RuntimeError as fault:
        if "torchvision::" not in str(fault):
            raise
    else:
        return None
    library: Any = importlib.import_module("torch").library.Library("torchvision", "DEF")
    for name in OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    importlib.import_module("torchvision")
    return library
