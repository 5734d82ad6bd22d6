"""Scores and choices as text for people: what costs how much, what was chosen, and what more bytes would buy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmpack.cli.show import show_table
from llmpack.encodings import encoding
from llmpack.units import format_size

if TYPE_CHECKING:
    from llmpack.calibration.scores import TensorScore
    from llmpack.pipeline.choosing import Choice
    from llmpack.pipeline.sensitivity import Diagnosis

POINTS = 9
"""Points of a curve that are shown."""


def show_diagnosis(found: Diagnosis, name: str, count: int) -> None:
    """The model in each encoding, then the matrices that cost most in one of them."""
    from llmpack.pipeline.sensitivity import METHOD

    matrices = len(found.scores.tensors)
    print(f"{found.model}: {matrices} matrices scored on {found.scores.tokens} tokens of {', '.join(found.text)}")
    print(f"KL divergence in nats per token, predicted by a {METHOD}; not measured\n")
    print("every matrix in one encoding:")
    show_table(
        [
            {
                "encoding": one,
                "bits": f"{encoding(one).bits_per_weight:g}",
                "GPTQ": f"{found.total(one):.2g}",
                "rounded to nearest": f"{found.total(one, nearest=True):.2g}",
            }
            for one in found.shared
        ]
    )
    total = found.total(name)
    print(f"\nthe {min(count, matrices)} most sensitive matrices at {name}:")
    show_table([_row(one, name, total, found) for one in found.most_sensitive(name, count)])
    print(f"\nby part at {name}:")
    parts = dict.fromkeys(one.part for one in found.scores.tensors)
    show_table([_part(part, name, total, found) for part in parts])
    for note in found.scores.notes:
        print(f"note: {note}")


def _row(one: TensorScore, name: str, total: float, found: Diagnosis) -> dict[str, object]:
    others = {other: f"{one.predicted[other]:.2g}" for other in found.shared if other != name}
    return {
        "matrix": one.name.removesuffix(".weight"),
        name: f"{one.predicted[name]:.2g}",
        "share": f"{one.predicted[name] / total:.1%}" if total else "",
        "input peak/rms": f"{one.peak:.0f}" if one.peak else "",
        "top 1 % of columns": f"{one.concentration:.0%}" if one.peak else "",
        **others,
    }


def _part(part: str, name: str, total: float, found: Diagnosis) -> dict[str, object]:
    scores = [one for one in found.scores.tensors if one.part == part]
    cost = sum(one.predicted[name] for one in scores)
    numbers = sum(one.shape[0] * one.shape[1] for one in scores)
    probe = next((probe for probe in found.scores.probes if probe.part == part), None)
    return {
        "part": part,
        name: f"{cost:.2g}",
        "share": f"{cost / total:.1%}" if total else "",
        "of all numbers": f"{numbers / sum(o.shape[0] * o.shape[1] for o in found.scores.tensors):.1%}",
        "measured / second order": f"{probe.factor:.2f}" if probe else "",
    }


def diagnosis_svg(found: Diagnosis, name: str) -> str:
    """Two heat maps: what each matrix costs in an encoding, and how far its input's outliers stand out."""
    from llmpack.cli.heatmap import Panel, heat_map

    inside = [one for one in found.scores.tensors if one.block is not None]
    parts = list(dict.fromkeys(one.part for one in inside))
    blocks = sorted({one.block for one in inside if one.block is not None})
    at = {(one.part, one.block): one for one in inside}
    cells = [[at.get((part, block)) for block in blocks] for part in parts]
    columns = [str(block) for block in blocks]
    return heat_map(
        f"{found.model}: predicted KL divergence, not measured",
        [
            Panel(
                f"each matrix at {name}, by block",
                parts,
                columns,
                [[None if one is None else one.predicted[name] for one in row] for row in cells],
                "nats",
            ),
            Panel(
                "largest number of its input over the root mean square",
                parts,
                columns,
                [[None if one is None else one.peak for one in row] for row in cells],
                "times",
            ),
        ],
    )


def show_choice(choice: Choice) -> None:
    """What quantize.auto chose, what that costs, and what more bytes would buy."""
    from llmpack.pipeline.choosing import MORE

    print("\nquantize.auto chose (KL divergence predicted by the second-order model, not measured):")
    rows = []
    for part, counts in choice.by_part().items():
        named = sorted(counts.items(), key=lambda pair: encoding(pair[0]).bits_per_weight)
        rows.append({"part": part, "encodings": ", ".join(f"{count} x {name}" for name, count in named)})
    show_table(rows)
    for words, used, bound in choice.limits:
        print(f"{words}: {used:,} of {bound:,}")
    for guess, measured in choice.compared:
        print(f"a mix of predicted KL {guess:.4g} was measured at {measured:.4g}")
    print(f"predicted KL {choice.predicted:.4g}; with {format_size(MORE)} more it would be {choice.more:.4g}")
    show_table([{"model file": f"{nbytes:,}", "predicted KL": f"{cost:.4g}"} for nbytes, cost in _some(choice)])


def _some(choice: Choice) -> list[tuple[int, float]]:
    """Points of the curve at about equal steps of bytes, the ends among them."""
    curve = choice.curve
    low, high = curve[0][0], curve[-1][0]
    wanted = [low + (high - low) * step // (POINTS - 1) for step in range(POINTS)]
    found = [max((point for point in curve if point[0] <= most), key=lambda point: point[0]) for most in wanted]
    return list(dict.fromkeys(found))
