"""How much a pruning step takes away: a count, a share, the parameters that the model is to have, or what has to go for
the budget."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llmpack.errors import Problem, RecipeError

PARAMETERS = re.compile(r"(\d+(?:\.\d+)?)\s*([KMB])")
BUDGET = "budget"
"""As little as has to go for the finished model to fit; a plan, which knows the budget, makes a number of it."""
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}


def _amount(value: Any) -> Any:
    """One answer to whatever is no amount, in place of one for each kind that there is."""
    count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    share = isinstance(value, float) and 0 < value < 1
    target = isinstance(value, str) and PARAMETERS.fullmatch(value) is not None
    if not (count or share or target or value == BUDGET):
        cure = 'write how many go (4), which share (0.25), the parameters to get down to ("90M"), or "budget"'
        raise ValueError(f"`{value}` is no amount; {cure}")
    return value


Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Target = Annotated[str, Field(pattern=f"^{PARAMETERS.pattern}$")]
Amount = Annotated[Count | Share | Target | Literal["budget"], BeforeValidator(_amount)]
"""``4``: so many. ``0.25``: this share. ``"90M"``: until the model has at most so many parameters. ``"budget"``: see
`BUDGET`."""


def parameters(target: str) -> int:
    """The number that a target such as "90M" stands for."""
    match = PARAMETERS.fullmatch(target)
    if match is None:
        raise ValueError(target)
    return round(float(match[1]) * _UNITS[match[2]])


def require_number(amount: Amount | None, name: str) -> None:
    """Raises RecipeError for an amount that a plan was to make a number of."""
    if amount == BUDGET:
        text = f'{name} = "budget" is known only to a plan, which knows the budget; give a number here'
        raise RecipeError([Problem(text, name)])
