"""`llmpack device probe`: this machine, or one that is reached over the network, measured, as a profile."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from llmpack.checkpoint.atomic import write_atomic
from llmpack.errors import UsageError
from llmpack.target.device import Device
from llmpack.target.probe import load_average, probe_host, with_runtime
from llmpack.target.profile_text import profile_text

if TYPE_CHECKING:
    from llmpack.pipeline.cache import Cache

BUSY = 0.5
"""Processes for each core, waiting or running over the last minute, from which on the machine counts as busy."""


def probed(out: Path | None, description: str, *, runtime: bool, on: str | None, cache: Cache) -> tuple[Device, str]:
    """A machine and the text of its profile, written to `out` if there is one.

    runtime  time the kernels of llama.cpp too
    on       address of another machine, None for this one

    Raises UsageError for a file that no profile may have, EnvironmentProblem for an unknown architecture, and what
    `pipeline.remote` raises.
    """
    if out is not None and out.suffix != ".toml":
        raise UsageError(f"--out {out}: a profile is a TOML file; give it a name that ends in .toml")
    if out is not None and not out.resolve().parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.resolve().parent}")
    found = _here(runtime) if on is None else _there(on, runtime, cache)
    text = profile_text(found, datetime.now(UTC).date().isoformat(), description)
    if out is not None:
        write_atomic(out, text.encode())
    return found, text


def _here(runtime: bool) -> Device:
    busy = load_average()
    found = probe_host(rates=True)
    if runtime:
        from llmpack.cli.progress import progress

        found = with_runtime(found, progress())
    if busy is not None and busy > BUSY * (found.cores or 1):
        text = f"{busy:.1f} processes wanted to run over the last minute, so the rates are too low"
        print(f"llmpack: {text}; probe again on a quiet machine", file=sys.stderr)
    return found


def _there(on: str, runtime: bool, cache: Cache) -> Device:
    from llmpack.pipeline.remote import probed_there

    return probed_there(on, cache, runtime=runtime)
