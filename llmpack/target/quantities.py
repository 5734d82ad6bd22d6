"""Quantities in recipes and device files: pydantic fields that read and write text with units."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from llmpack.units import parse_rate, parse_seconds, parse_size


def parse_bandwidth(text: object) -> int:
    """Bytes per second of ``"17.1 GB/s"``. Raises ValueError for anything else."""
    if not isinstance(text, str) or not text.rstrip().endswith("/s"):
        raise ValueError(f'{text!r} is not a bandwidth; write it like "17.1 GB/s"')
    return parse_size(text.rstrip()[: -len("/s")])


def parse_flops(text: object) -> float:
    """Floating point operations per second of ``"105 GFLOP/s"``. Raises ValueError for anything else."""
    scales = {"GFLOP/s": 1e9, "TFLOP/s": 1e12}
    number, _, unit = text.strip().partition(" ") if isinstance(text, str) else ("", "", "")
    if unit.strip() not in scales or not number.replace(".", "", 1).isdigit():
        raise ValueError(f'{text!r} is not a rate of arithmetic; write it like "105 GFLOP/s"')
    return float(number) * scales[unit.strip()]


def _text(pattern: str, example: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": pattern, "examples": [example]})


_NUMBER = r"^\s*\d[\d_]*(\.\d+)?\s*"

Size = Annotated[
    int,
    Field(gt=0),
    BeforeValidator(parse_size),
    PlainSerializer(lambda count: f"{count} B", return_type=str),
    _text(_NUMBER + r"(B|[kKMGT]B|[KMGT]iB)\s*$", "350 MiB"),
]
"""Bytes, written with a unit."""

Rate = Annotated[
    float,
    Field(gt=0),
    BeforeValidator(parse_rate),
    PlainSerializer(lambda rate: f"{rate:f} tok/s", return_type=str),
    _text(_NUMBER + r"(tok|tokens)/s\s*$", "8 tok/s"),
]
"""Tokens per second."""

Seconds = Annotated[
    float,
    Field(gt=0),
    BeforeValidator(parse_seconds),
    PlainSerializer(lambda seconds: f"{seconds:.9f} s", return_type=str),
    _text(_NUMBER + r"(ms|s|min|h)\s*$", "1.5 s"),
]
"""Seconds, written with a unit of time."""

Bandwidth = Annotated[
    int,
    Field(gt=0),
    BeforeValidator(parse_bandwidth),
    PlainSerializer(lambda count: f"{count} B/s", return_type=str),
    _text(_NUMBER + r"(B|[kKMGT]B|[KMGT]iB)/s\s*$", "17.1 GB/s"),
]
"""Bytes per second."""

Flops = Annotated[
    float,
    Field(gt=0),
    BeforeValidator(parse_flops),
    PlainSerializer(lambda rate: f"{rate / 1e9:f} GFLOP/s", return_type=str),
    _text(r"^\s*\d+(\.\d+)?\s[GT]FLOP/s\s*$", "105 GFLOP/s"),
]
"""Floating point operations per second."""
