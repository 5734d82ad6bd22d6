"""Commands that have a second word: `llmpack cache ...` and `llmpack device ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmpack.cli.arguments import CacheFolder, On, open_cache
from llmpack.cli.command import command
from llmpack.cli.session import Session

cache_app = typer.Typer(help="Look at, check and clean the cache of finished work.", no_args_is_help=True)
device_app = typer.Typer(help="Look at the devices that bundles are made for, or probe this one.", no_args_is_help=True)


@cache_app.command("ls")
@command
def cache_ls(session: Session, cache: CacheFolder = None) -> None:
    """List finished and unfinished work."""
    from llmpack.cli.listing import cache_rows
    from llmpack.cli.show import show_table

    rows = cache_rows(open_cache(cache))
    session.answer(rows, lambda: show_table(rows))


@cache_app.command("verify")
@command
def cache_verify(session: Session, cache: CacheFolder = None) -> int:
    """Compute every digest again. Damaged work is made again by the next build that needs it."""
    from llmpack.cli.listing import cache_damage
    from llmpack.cli.show import show_table
    from llmpack.errors import VerificationFailed

    rows = cache_damage(open_cache(cache))
    session.answer(rows, lambda: show_table(rows))
    return VerificationFailed.exit_code if rows else 0


@cache_app.command("gc")
@command
def cache_gc(
    session: Session,
    days: Annotated[float, typer.Option("--days", min=0.0, help="Remove what was not used for so many days.")] = 30.0,
    key: Annotated[str | None, typer.Option("--key", help="Remove the entries whose key starts like this.")] = None,
    cache: CacheFolder = None,
) -> None:
    """Remove work that nobody used for a while."""
    from llmpack.cli.listing import collect
    from llmpack.cli.show import show_table

    rows = collect(open_cache(cache), days, key)
    session.answer(rows, lambda: show_table(rows))


@device_app.command("list")
@command
def device_list(session: Session) -> None:
    """List the profiles."""
    from llmpack.cli.listing import devices
    from llmpack.cli.show import show_table

    rows = devices()
    session.answer(rows, lambda: show_table(rows))


@device_app.command("show")
@command
def device_show(
    session: Session,
    name: Annotated[str, typer.Argument(help="A name, a profile's FILE.toml, or `host`.", show_default=False)],
) -> None:
    """Show every figure of a device, with where it is from; an unknown one is named as unknown."""
    from llmpack.cli.show import show_device
    from llmpack.target.device import device as find

    found = find(name)
    session.answer(found.model_dump(mode="json"), lambda: show_device(found))


@device_app.command("probe")
@command
def device_probe(
    session: Session,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.toml", help="Write a profile.")] = None,
    description: Annotated[str, typer.Option("--description", help="What to call this machine.")] = "",
    runtime: Annotated[
        bool, typer.Option("--runtime", help="Time llama.cpp's kernels too (ten minutes), to predict speed from them.")
    ] = False,
    on: On = None,
    cache: CacheFolder = None,
) -> None:
    """Measure this machine, or another, and write a profile of it; without --out it is printed."""
    from llmpack.cli.probing import probed

    found, text = probed(out, description, runtime=runtime, on=on, cache=open_cache(cache))
    session.answer(found.model_dump(mode="json"), lambda: print(text, end=""))


@device_app.command("answer", hidden=True)
@command
def device_answer(session: Session, cache: CacheFolder = None) -> None:
    """Answer a check from another machine: one request in JSON on standard input, one answer on standard output."""
    from llmpack.pipeline.on_device import serve

    serve(open_cache(cache))
