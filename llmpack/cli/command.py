"""The decorator of every command: `--json` and `--debug`, errors and exit codes in one place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from llmpack.cli.session import Session, conduct, report_bugs

Json = Annotated[bool, typer.Option("--json", help="Answer with one JSON document on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]


def command(function: Callable[..., int | None]) -> Callable[..., None]:
    """A command line function from one that takes a `Session` first and its options after it."""
    own = inspect.signature(function)
    hints = get_type_hints(function, include_extras=True)
    parameters = [p.replace(annotation=hints[p.name]) for p in list(own.parameters.values())[1:]]
    for name, hint in (("json", Json), ("debug", Debug)):
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=hint))

    @functools.wraps(function)
    def run(*, json: bool, debug: bool, **options: Any) -> None:
        session = Session(json=json, debug=debug)
        report_bugs(session)
        raise typer.Exit(conduct(session, lambda: function(session, **options)))

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    del run.__wrapped__  # typer would look through it and find the session
    return run
