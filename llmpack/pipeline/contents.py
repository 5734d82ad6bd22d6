"""The small files of a bundle, and how much disk the whole takes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from llmpack.formats.bundle import CARD, LOCK, MANIFEST, RECIPE, disk_usage
from llmpack.formats.card import Card
from llmpack.formats.safetensors_folder import SafetensorsFormat
from llmpack.pipeline.manifest import Manifest, Observed, lock, made
from llmpack.pipeline.state import Build
from llmpack.target.budget import format_figure
from llmpack.target.verdict_table import device_rows, verdict_rows


def small_files(build: Build, observed: Observed) -> dict[str, bytes]:
    """Manifest, card, recipe and lock, by name."""
    return {
        MANIFEST: Manifest(made(build), observed).text().encode(),
        CARD: _card(build, observed).text().encode(),
        RECIPE: build.document.text.encode(),
        LOCK: (json.dumps(lock(build), indent=1, ensure_ascii=False) + "\n").encode(),
    }


def sums_size(names: Iterable[str]) -> int:
    """Bytes of SHA256SUMS over files of these names."""
    return sum(64 + 2 + len(name) + 1 for name in names)


def bundle_usage(build: Build, small: Mapping[str, bytes], licences: Iterable[Path]) -> int:
    """Bytes of disk that the whole bundle takes."""
    sizes = {name: len(data) for name, data in small.items()}
    sizes |= build.artifact.sizes
    sizes |= {path.name: path.stat().st_size for path in licences}
    return disk_usage((*sizes.values(), sums_size(sizes)))


def _card(build: Build, observed: Observed) -> Card:
    planned, form = build.plan, build.plan.file_format
    return Card(
        title=build.recipe.name,
        relation=_relation(build),
        facts=planned.facts,
        layout=form.layout.name if isinstance(form, SafetensorsFormat) else None,
        source=build.recipe.source.model,
        nbytes=build.artifact.nbytes,
        parameters=planned.graph.parameters,
        recipe=build.document.text,
        encodings=planned.totals,
        quality=[
            (finding.limit.removeprefix("quality."), format_figure(finding.limit, finding.value))
            for finding in observed.findings
            if finding.limit.startswith("quality.")
        ],
        verdict=_verdict_table(observed),
        notes=observed.notes,
    )


def _relation(build: Build) -> str:
    """How the model derives from its base, in the hub's words: other weights, or the same ones in fewer bits."""
    form = build.plan.file_format
    plain = isinstance(form, SafetensorsFormat) and form.layout.name == "plain"
    return "finetune" if plain or any(step.trains for step in build.recipe.step) else "quantized"


def _verdict_table(observed: Observed) -> list[tuple[str, ...]]:
    if observed.others:
        return device_rows(observed.verdicts)
    return [("limit", "wanted", "found", "status", "evidence"), *verdict_rows(observed.verdict)]
