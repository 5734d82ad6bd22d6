"""The small files of a bundle, and how much disk the whole takes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from llmpack.formats.bundle import CARD, LOCK, MANIFEST, RECIPE
from llmpack.formats.card import Card
from llmpack.pipeline.manifest import Manifest, Observed, lock, made
from llmpack.pipeline.plan import totals
from llmpack.pipeline.state import Build
from llmpack.target.budget import AT_LEAST, Verdict, format_figure

BLOCK = 4096
"""Disks give space in blocks; nearly all file systems use this size."""


def small_files(build: Build, observed: Observed) -> dict[str, bytes]:
    """Manifest, card, recipe and lock, by name."""
    return {
        MANIFEST: Manifest(made(build), observed).text().encode(),
        CARD: _card(build, observed).text().encode(),
        RECIPE: build.document.text.encode(),
        LOCK: (json.dumps(lock(build), indent=1, ensure_ascii=False) + "\n").encode(),
    }


def disk_usage(sizes: Iterable[int]) -> int:
    """Bytes of disk that files of these sizes take, in whole blocks."""
    return sum(-(-size // BLOCK) * BLOCK for size in sizes)


def sums_size(names: Iterable[str]) -> int:
    """Bytes of SHA256SUMS over files of these names."""
    return sum(64 + 2 + len(name) + 1 for name in names)


def bundle_usage(build: Build, small: Mapping[str, bytes], licences: Iterable[Path]) -> int:
    """Bytes of disk that the whole bundle takes."""
    sizes = {name: len(data) for name, data in small.items()}
    sizes |= {build.artifact.path.name: build.artifact.nbytes}
    sizes |= {path.name: path.stat().st_size for path in licences}
    return disk_usage((*sizes.values(), sums_size(sizes)))


def _card(build: Build, observed: Observed) -> Card:
    planned = build.plan
    return Card(
        title=build.recipe.name,
        facts=planned.facts,
        source=build.recipe.source.model,
        nbytes=build.artifact.nbytes,
        parameters=planned.graph.parameters,
        recipe=build.document.text,
        encodings=totals(planned.graph),
        quality=[
            (finding.limit.removeprefix("quality."), format_figure(finding.limit, finding.value))
            for finding in observed.findings
            if finding.limit.startswith("quality.")
        ],
        verdict=verdict_rows(observed.verdict),
        notes=observed.notes,
    )


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
