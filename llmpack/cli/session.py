"""What surrounds every command: streams, errors, signals and exit codes.

stdout carries the answer (with ``--json`` exactly one document), stderr everything else. An error of
llmpack is shown without a traceback unless ``--debug`` is given, and its class owns the exit code.
"""

from __future__ import annotations

import errno
import json
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from llmpack.errors import BudgetMissed, EnvironmentProblem, LlmpackError, Problem

if TYPE_CHECKING:
    from llmpack.target.budget import Verdict

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
"""Errors of the system that say something about this machine, not about llmpack."""


class Terminated(BaseException):
    """SIGTERM arrived; everything unwinds as it does for Ctrl-C."""


@dataclass
class Session:
    """How the user wants to be answered; filled from the options of the command."""

    debug: bool = False
    json: bool = False

    def answer(self, document: Any, show: Callable[[], None]) -> None:
        """The answer of a command: a JSON document, or what `show` prints for people."""
        if self.json:
            print(json.dumps(document, indent=2, ensure_ascii=False))
        else:
            show()


def describe(error: LlmpackError) -> dict[str, Any]:
    """The JSON form of an error."""
    kind = type(error).__name__
    found: dict[str, Any] = {"kind": kind, "message": str(error), "exit_code": error.exit_code}
    problems = getattr(error, "problems", ())
    if problems:
        found["problems"] = [
            {name: getattr(p, name) for name in ("message", "path", "where", "rule") if getattr(p, name)}
            for p in problems
            if isinstance(p, Problem)
        ]
    verdicts = _verdicts(error)
    if verdicts:
        found["verdicts"] = [verdict.to_json() for verdict in verdicts]
    return {"error": found}


def _verdicts(error: LlmpackError) -> list[Verdict]:
    if not isinstance(error, BudgetMissed):
        return []
    from llmpack.target.budget import Verdict

    return [verdict for verdict in error.verdicts if isinstance(verdict, Verdict)]


@contextmanager
def _terminable() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def conduct(session: Session, command: Callable[[], int | None]) -> int:
    """Run a command and give its exit code."""
    try:
        with _terminable():
            return command() or 0
    except LlmpackError as error:
        if session.debug:
            traceback.print_exc()
        if session.json:
            print(json.dumps(describe(error), indent=2, ensure_ascii=False))
        print(f"llmpack: {_headline(error)}", file=sys.stderr)
        verdicts = _verdicts(error)
        if verdicts:
            from llmpack.cli.show import verdicts_lines

            print("\n".join(verdicts_lines(verdicts)), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("llmpack: interrupted; what is finished is kept, the same command goes on from there", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Terminated:
        print("llmpack: terminated; what is finished is kept, the same command goes on from there", file=sys.stderr)
        return EXIT_TERMINATED
    except BrokenPipeError:
        sys.stdout = None  # the reader is gone; nothing may be flushed to it
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in _MACHINE:
            raise
        print(f"llmpack: {error.filename or 'the disk'}: {error.strerror}", file=sys.stderr)
        return EnvironmentProblem.exit_code
    except MemoryError:
        print("llmpack: this machine ran out of memory; close other programs", file=sys.stderr)
        return EnvironmentProblem.exit_code


def report_bugs(session: Session) -> None:
    """From now on an exception that nobody expected ends the process with a request to report it."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if session.debug:
            traceback.print_exception(kind, error, trace)
        print(f"llmpack: this is a bug: {kind.__name__}: {error}", file=sys.stderr)
        print("llmpack: run the command again with --debug and report what it prints", file=sys.stderr)

    sys.excepthook = hook


def _headline(error: LlmpackError) -> str:
    problems = getattr(error, "problems", ())
    if len(problems) > 1:
        return f"{len(problems)} problems\n" + "\n".join(f"  {problem}" for problem in problems)
    return str(error)
