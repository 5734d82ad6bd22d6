"""A heat map as SVG: one cell for each block and part, with its figure as a tooltip. Equal data give equal bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

CELL, LEFT, TOP = 18, 110, 56
COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""From little to much: dark to light, also told apart without colour vision."""
EMPTY = "#eeeeee"
STEPS = 5


@dataclass(frozen=True)
class Panel:
    """One map.

    values  [rows][columns], positive; None for a cell that does not exist
    unit    what the values are
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    unit: str


def heat_map(title: str, panels: Sequence[Panel]) -> str:
    """An SVG document with the panels under each other, colours by the logarithm of the values."""
    width = LEFT + CELL * max(len(panel.columns) for panel in panels) + 20
    width = max(width, 560)
    parts, y = [_text(10, 22, title, 15)], 34
    for panel in panels:
        parts += _panel(panel, y)
        y += TOP + CELL * len(panel.rows) + 44
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" font-family="sans-serif">'
    background = f'<rect width="{width}" height="{y}" fill="#ffffff"/>'
    return "\n".join([head, background, *parts, "</svg>"]) + "\n"


def _panel(panel: Panel, top: int) -> list[str]:
    known = [value for row in panel.values for value in row if value is not None and value > 0]
    low, high = (math.log10(min(known)), math.log10(max(known))) if known else (0.0, 0.0)
    parts = [_text(10, top + 18, panel.title, 12)]
    for at, name in enumerate(panel.columns):
        if at % 5 == 0 or len(panel.columns) <= 10:
            parts.append(_text(LEFT + CELL * at + CELL // 2, top + TOP - 6, name, 10, "middle"))
    for line, (name, row) in enumerate(zip(panel.rows, panel.values, strict=True)):
        y = top + TOP + CELL * line
        parts.append(_text(LEFT - 6, y + 13, name, 11, "end"))
        for at, value in enumerate(row):
            tip = f"{name}, block {panel.columns[at]}: " + ("none" if value is None else f"{value:.3g} {panel.unit}")
            parts.append(_cell(LEFT + CELL * at, y, _colour(value, low, high), tip))
    return parts + _legend(panel, top + TOP + CELL * len(panel.rows) + 10, low, high)


def _legend(panel: Panel, y: int, low: float, high: float) -> list[str]:
    parts = []
    for step in range(STEPS):
        value = 10 ** (low + (high - low) * step / (STEPS - 1))
        x = LEFT + 80 * step
        parts.append(_cell(x, y, _colour(value, low, high), f"{value:.3g} {panel.unit}"))
        parts.append(_text(x + CELL + 4, y + 13, f"{value:.2g}", 10))
    return [*parts, _text(LEFT + 80 * STEPS, y + 13, panel.unit, 10)]


def _colour(value: float | None, low: float, high: float) -> str:
    if value is None:
        return EMPTY
    share = 0.0 if value <= 0 or high <= low else (math.log10(value) - low) / (high - low)
    place = min(max(share, 0.0), 1.0) * (len(COLOURS) - 1)
    at = min(int(place), len(COLOURS) - 2)
    mixed = (round(a + (b - a) * (place - at)) for a, b in zip(COLOURS[at], COLOURS[at + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _cell(x: int, y: int, colour: str, tip: str) -> str:
    size = CELL - 1
    return f'<rect x="{x}" y="{y}" width="{size}" height="{size}" fill="{colour}"><title>{escape(tip)}</title></rect>'


def _text(x: int, y: int, text: str, size: int, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'
