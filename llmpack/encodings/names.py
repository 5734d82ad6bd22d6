"""Names of the int groups that the GPTQ layout holds: ``int4_g128``, ``int3_row_asym``, ``int4_g32_act``.

bits           2, 3, 4 or 8
group          g32, g64, g128: so many columns share a scale; row: a whole row does
symmetric      as GPTQ's ``sym = true``: zero is the middle code. With ``_asym`` each group has a zero of its own
act_order      as GPTQ's ``desc_act = true``, with ``_act``: columns whose inputs are alike in size share a scale,
               wherever they lie; else neighbours do
"""

from __future__ import annotations

from typing import NamedTuple

INT_BITS = (2, 3, 4, 8)
INT_GROUPS = {"g32": 32, "g64": 64, "g128": 128, "row": -1}
"""Columns per group by word; -1 is a whole row, as in quantize_config.json."""

ACT = "_act"

_NEIGHBOURS = tuple(f"int{bits}_{group}{zeros}" for bits in INT_BITS for group in INT_GROUPS for zeros in ("", "_asym"))
ORDERED_NAMES = tuple(f"{name}{ACT}" for name in _NEIGHBOURS if "_row" not in name)
"""Those of columns in the order of their inputs; a whole row has no order."""

INT_NAMES = (*_NEIGHBOURS, *ORDERED_NAMES)


class IntOptions(NamedTuple):
    """What a name says."""

    bits: int
    group: int
    symmetric: bool
    act_order: bool


def int_options(name: str) -> IntOptions:
    """What a name in `INT_NAMES` says; a group of -1 is a whole row. Raises ValueError for another."""
    if name not in INT_NAMES:
        raise ValueError(f"{name} is no encoding of int groups; they are called like int4_g128 and int4_g128_asym")
    head, group, *more = name.split("_")
    return IntOptions(int(head.removeprefix("int")), INT_GROUPS[group], "asym" not in more, "act" in more)
