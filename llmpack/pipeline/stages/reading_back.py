"""Stage 6, read back: the file is parsed afresh, compared, and loaded by its runtime. A broken one does not live on."""

from __future__ import annotations

from dataclasses import replace

from llmpack.errors import VerificationFailed
from llmpack.formats.readback import read_back as compare
from llmpack.pipeline.state import Build


def read_back(build: Build) -> Build:
    """Fill in `checked`. Raises VerificationFailed with every difference, after deleting the file."""
    artifact, planned = build.artifact, build.plan
    try:
        checked = compare(
            artifact.path,
            build.checkpoint,
            planned.graph,
            planned.file_format,
            planned.facts,
            build.recipe.runtime,
            build.progress,
        )
    except VerificationFailed:
        artifact.path.unlink()
        raise
    return replace(build, checked=checked)
