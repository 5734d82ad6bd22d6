"""Every error that llmpack raises on purpose, and the exit code that each class owns.

    LlmpackError                    1   (never raised itself)
      + UsageError                  2   the command line is wrong
      + RecipeError                 3   the recipe, budget or device file is wrong; lists every problem
      + BudgetMissed                4   the bundle is sound and misses a declared limit
      + InputRejected               5   a source is hostile, damaged, unknown or not allowed
      + EnvironmentProblem          6   this machine lacks something
          + MissingExtra            6   a Python package of an extra is not installed
          + DeviceProblem           6   another device is out of reach, or is not fit to measure on
      + StepFailed                  7   a step could not do its work
          + NumericalError          7   a matrix would not factor, a loss was not finite
          + RuntimeFailed           7   a runtime child crashed, hung or ran out of memory
      + VerificationFailed          8   what was written does not read back as what was meant
      + LicenceProblem              9   the licence of an input does not allow what the recipe asks
      + Busy                       75   another build holds the lock

A message says what happened with the numbers, where, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class LlmpackError(Exception):
    """Base of all errors that are shown to the user without a traceback."""

    exit_code = 1


class UsageError(LlmpackError):
    """The command line asks for something that does not exist."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a file: where it stands and how to mend it.

    `where` is ``file:line:col`` as far as known, `path` the TOML path such as ``step.0.encoding``.
    """

    message: str
    path: str = ""
    where: str = ""
    rule: str = ""

    def __str__(self) -> str:
        parts = [part for part in (self.where, self.path) if part]
        head = " ".join(parts)
        text = f"{head}: {self.message}" if head else self.message
        return f"[{self.rule}] {text}" if self.rule else text


class _Listed(LlmpackError):
    """An error that carries all problems that were found, not the first one."""

    def __init__(self, problems: Sequence[Problem | str]) -> None:
        self.problems = tuple(Problem(p) if isinstance(p, str) else p for p in problems)
        super().__init__("\n".join(str(p) for p in self.problems))


class RecipeError(_Listed):
    """The recipe (or a budget or device file) is wrong."""

    exit_code = 3


class BudgetMissed(LlmpackError):
    """A declared limit failed or could not be measured. `verdicts` have the rows, one for each device."""

    exit_code = 4

    def __init__(self, message: str, *verdicts: object) -> None:
        super().__init__(message)
        self.verdicts = verdicts

    @property
    def verdict(self) -> object | None:
        """That of the first device."""
        return self.verdicts[0] if self.verdicts else None


class InputRejected(_Listed):
    """A source file is hostile, damaged, of an unknown family, or of a kind that is never read."""

    exit_code = 5


class EnvironmentProblem(LlmpackError):
    """This machine lacks a package, a compiler, disk, memory, or the network."""

    exit_code = 6


class MissingExtra(EnvironmentProblem):
    """A package that an extra of llmpack brings is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"the Python package `{package}` is not installed; install it with: pip install 'llmpack[{extra}]'"
        )


class DeviceProblem(EnvironmentProblem):
    """Another device is out of reach or is not fit to measure on.

    `kind` is unreachable, host-key, login, lost, no-space, no-runner, mismatch or unknown.
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class StepFailed(LlmpackError):
    """A step could not do its work; what was finished before is kept."""

    exit_code = 7


class NumericalError(StepFailed):
    """A matrix would not factor or a value was not finite."""


class RuntimeFailed(StepFailed):
    """A runtime child ended without a result. `kind` is refused, abort, crash, oom, killed, hang or protocol."""

    def __init__(self, message: str, kind: str = "crash") -> None:
        super().__init__(message)
        self.kind = kind


class VerificationFailed(_Listed):
    """What was written does not read back, load or compute as it should."""

    exit_code = 8


class LicenceProblem(LlmpackError):
    """A licence is missing or does not allow what the recipe asks."""

    exit_code = 9


class Busy(LlmpackError):
    """Another process is building the same thing."""

    exit_code = 75
