"""Answers as text for people: aligned columns, figures with their units, nothing that a pipe would choke on."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmpack.units import format_size

if TYPE_CHECKING:
    from llmpack.pipeline.inspection import Inspection

_NUMBER = re.compile(r"-?[\d,.]*( [kKMGT]?i?B)?")
_COLOURS = {"PASS": "32", "FAIL": "31", "UNMEASURED": "33"}


def show_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with equal keys, as columns under their names; nothing for no rows."""
    if rows:
        print("\n".join(columns([list(rows[0]), *(list(row.values()) for row in rows)])))


def columns(lines: Sequence[Sequence[object]]) -> list[str]:
    """Cells padded to the widest of their column; numbers stand right, text left."""
    texts = [["" if cell is None else str(cell) for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in texts) for i in range(len(texts[0]))]
    right = [all(_NUMBER.fullmatch(line[i]) for line in texts[1:]) for i in range(len(widths))]
    padded = (
        "  ".join(
            cell.rjust(width) if flag else cell.ljust(width)
            for cell, width, flag in zip(line, widths, right, strict=True)
        )
        for line in texts
    )
    return [line.rstrip() for line in padded]


def coloured(status: str) -> str:
    """PASS, FAIL or UNMEASURED; in colour on a terminal that wants it."""
    import os

    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return status
    word = status.strip()
    return f"\x1b[{_COLOURS[word]}m{status}\x1b[0m" if word in _COLOURS else status


def show_inspection(found: Inspection, tensors: bool) -> None:
    """A model on disk."""
    print(f"{found.path}: {found.kind}, {format_size(found.nbytes)}")
    print(
        f"{found.parameters:,} parameters in {len(found.tensors)} tensors, {found.bits_per_weight:.3f} bits per weight"
    )
    rows = [
        {"encoding": name, "tensors": count, "parameters": f"{numbers:,}", "bytes": f"{nbytes:,}"}
        for name, (count, numbers, nbytes) in found.by_encoding().items()
    ]
    show_table(rows)
    if tensors:
        print()
        show_table(
            [
                {"tensor": t.name, "shape": " x ".join(map(str, t.shape)), "encoding": t.encoding, "bytes": t.nbytes}
                for t in found.tensors
            ]
        )
    print()
    for key, value in found.facts.items():
        print(f"{key} = {value}")
