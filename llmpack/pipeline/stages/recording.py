"""Stage 9, record: manifest, card, recipe, lock and checksums; then one rename makes the bundle appear."""

from __future__ import annotations

from dataclasses import replace

from llmpack.checkpoint.atomic import write_atomic
from llmpack.formats.bundle import publish_bundle
from llmpack.pipeline.contents import small_files
from llmpack.pipeline.state import Build


def record(build: Build) -> Build:
    """Fill in `bundle`. Licence texts were copied when the bundle was judged, since they count for the disk."""
    for name, data in small_files(build, build.observed).items():
        write_atomic(build.workspace / name, data)
    return replace(build, bundle=publish_bundle(build.workspace, build.final))
