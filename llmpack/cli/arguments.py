"""What arguments of several commands are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from llmpack.pipeline.cache import Cache

CacheFolder = Annotated[
    Path | None,
    typer.Option("--cache", help="Folder of finished work (default: $LLMPACK_CACHE or ~/.cache/llmpack)."),
]
On = Annotated[str | None, typer.Option("--on", metavar="ADDRESS", help="Measure ssh://user@host or adb://serial.")]


def open_cache(folder: Path | None, no_wait: bool = False) -> Cache:
    """The cache in that folder, or the user's own."""
    from llmpack.cli.progress import progress
    from llmpack.pipeline.cache import Cache, default_root

    return Cache(folder or default_root(), wait=not no_wait, progress=progress())
