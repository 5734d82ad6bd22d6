"""Names of the int groups that the GPTQ layout holds: ``int4_g128``, ``int3_row_asym``.

bits           2, 3, 4 or 8
group          g32, g64, g128: so many columns share a scale; row: a whole row does
symmetric      as GPTQ's ``sym = true``: zero is the middle code. With ``_asym`` each group has a zero of its own
"""

from __future__ import annotations

INT_BITS = (2, 3, 4, 8)
INT_GROUPS = {"g32": 32, "g64": 64, "g128": 128, "row": -1}
"""Columns per group by word; -1 is a whole row, as in quantize_config.json."""

INT_NAMES = tuple(f"int{bits}_{group}{zeros}" for bits in INT_BITS for group in INT_GROUPS for zeros in ("", "_asym"))


def int_options(name: str) -> tuple[int, int, bool]:
    """(bits, columns per group or -1, symmetric) of a name in `INT_NAMES`. Raises ValueError for another."""
    if name not in INT_NAMES:
        raise ValueError(f"{name} is no encoding of int groups; they are called like int4_g128 and int4_g128_asym")
    head, group, *asymmetric = name.split("_")
    return int(head.removeprefix("int")), INT_GROUPS[group], not asymmetric
