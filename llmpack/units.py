"""Quantities as people write them: ``"2.5 GiB"``, ``"8 tok/s"``, ``"1.5 s"``.

A size carries its unit, binary (KiB, MiB, GiB, TiB) or decimal (kB, MB, GB, TB); ``"2G"`` and bare
numbers are refused because they mean different things to different people.
"""

from __future__ import annotations

import re
from decimal import Decimal

SIZE_UNITS = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
TIME_UNITS = {"ms": Decimal("0.001"), "s": Decimal(1), "min": Decimal(60), "h": Decimal(3600)}
RATE_UNITS = ("tok/s", "tokens/s")

_QUANTITY = re.compile(r"\s*(?P<number>\d[\d_]*(?:\.\d+)?)\s*(?P<unit>[A-Za-z/]*)\s*\Z")


def _split(text: object, kind: str, example: str) -> tuple[Decimal, str]:
    if not isinstance(text, str):
        raise ValueError(f"{text!r} has no unit; write a {kind} like {example}")
    match = _QUANTITY.match(text)
    if match is None or len(text) > 64:
        raise ValueError(f"{text!r} is not a {kind}; write it like {example}")
    return Decimal(match["number"].replace("_", "")), match["unit"]


def parse_size(text: object) -> int:
    """Bytes of ``"2.5 GiB"``. Raises ValueError for a missing, bare or unknown unit."""
    number, unit = _split(text, "size", '"2.5 GiB" or "900 MB"')
    if unit not in SIZE_UNITS:
        close = [u for u in SIZE_UNITS if unit and u.lower().startswith(unit[0].lower())]
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"{text!r}: {unit or 'no unit'} is not a unit of size{hint}")
    return int(number * SIZE_UNITS[unit])


def parse_seconds(text: object) -> float:
    """Seconds of ``"1.5 s"`` or ``"300 ms"``. Raises ValueError as `parse_size` does."""
    number, unit = _split(text, "time", '"1.5 s" or "300 ms"')
    if unit not in TIME_UNITS:
        raise ValueError(f"{text!r}: {unit or 'no unit'} is not a unit of time; use ms, s, min or h")
    return float(number * TIME_UNITS[unit])


def parse_rate(text: object) -> float:
    """Tokens per second of ``"8 tok/s"``. Raises ValueError as `parse_size` does."""
    number, unit = _split(text, "rate", '"8 tok/s"')
    if unit not in RATE_UNITS:
        raise ValueError(f'{text!r}: {unit or "no unit"} is not a rate; write it like "8 tok/s"')
    return float(number)


def format_size(count: float) -> str:
    """``"105.3 MiB"``: four significant digits, binary units."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{int(value)} B" if unit == "B" else f"{value:.4g} {unit}"


def format_seconds(seconds: float) -> str:
    """``"340 ms"``, ``"12.3 s"``, ``"4 min 10 s"``, ``"1 h 02 min"``."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def format_rate(tokens_per_second: float) -> str:
    """``"8.31 tok/s"``."""
    return f"{tokens_per_second:.3g} tok/s" if tokens_per_second < 1000 else f"{tokens_per_second:.0f} tok/s"
