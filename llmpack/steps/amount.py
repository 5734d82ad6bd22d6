"""How much a pruning step takes away: a count, a share, or the parameters that the model is to have."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

PARAMETERS = re.compile(r"(\d+(?:\.\d+)?)\s*([KMB])")
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}


def _target(text: str) -> str:
    if PARAMETERS.fullmatch(text) is None:
        raise ValueError(f'`{text}` is no number of parameters; write "90M" or "1.2B"')
    return text


Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Target = Annotated[str, AfterValidator(_target)]
Amount = Count | Share | Target
"""``4``: so many. ``0.25``: this share. ``"90M"``: until the model has at most so many parameters."""


def parameters(target: str) -> int:
    """The number that a target such as "90M" stands for."""
    match = PARAMETERS.fullmatch(target)
    if match is None:
        raise ValueError(target)
    return round(float(match[1]) * _UNITS[match[2]])
