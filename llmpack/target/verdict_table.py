"""Verdicts as rows of text, for terminals, cards and pages of pipelines."""

from __future__ import annotations

from llmpack.target.budget import AT_LEAST, Verdict, format_figure


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
