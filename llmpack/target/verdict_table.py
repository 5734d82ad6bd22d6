"""Verdicts as rows of text, for terminals, cards and pages of pipelines."""

from __future__ import annotations

from collections.abc import Sequence

from llmpack.target.budget import AT_LEAST, Row, Verdict, format_figure


def verdict_rows(verdict: Verdict) -> list[tuple[str, str, str, str, str]]:
    """Limit, wanted, found, status and evidence of each row, for tables."""
    return [
        (
            row.limit,
            f"{'>=' if row.limit in AT_LEAST else '<='} {format_figure(row.limit, row.bound)}",
            "unknown" if row.value is None else format_figure(row.limit, row.value),
            row.status,
            row.evidence.kind if row.evidence else row.reason,
        )
        for row in verdict.rows
    ]


def device_rows(verdicts: Sequence[Verdict]) -> list[tuple[str, ...]]:
    """Head and rows of a table with a column for each device; the budget of all is the same."""
    head = ("limit", "wanted", *(verdict.device for verdict in verdicts))
    rows = [head]
    for index, row in enumerate(verdicts[0].rows):
        wanted = f"{'>=' if row.limit in AT_LEAST else '<='} {format_figure(row.limit, row.bound)}"
        rows.append((row.limit, wanted, *(_cell(verdict.rows[index]) for verdict in verdicts)))
    return [*rows, ("in all", "", *("PASS" if verdict.passes else "FAIL" for verdict in verdicts))]


def _cell(row: Row) -> str:
    value = "unknown" if row.value is None else format_figure(row.limit, row.value)
    mark = " (estimate)" if row.evidence and row.evidence.kind == "estimate" else ""
    return f"{value} {row.status}{mark}"
