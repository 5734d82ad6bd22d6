"""The program starts fast, says what it can do, and ends with the code that the outcome owns."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from llmpack import errors
from llmpack.cli.session import Session, Terminated, conduct, describe

COMMANDS = (
    "build",
    "plan",
    "check",
    "verify",
    "inspect",
    "eval",
    "run",
    "sensitivity",
    "list",
    "schema",
    "cache",
    "device",
)


def llmpack(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "llmpack", *arguments], capture_output=True, text=True, **options)


def test_help_names_every_command_and_imports_nothing_heavy():
    code = """
        import sys
        from llmpack.cli.main import main
        sys.argv = ["llmpack", "--help"]
        try:
            main()
        except SystemExit as end:
            assert end.code == 0, end.code
        heavy = {"torch", "transformers", "numpy", "pydantic", "tokenizers", "llama_cpp"} & set(sys.modules)
        assert not heavy, heavy
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f" {name} " in done.stdout


@pytest.mark.parametrize(
    "command", [*COMMANDS, "cache ls", "cache gc", "cache verify", "device list", "device show", "device probe"]
)
def test_every_command_has_help_for_itself_and_its_options(command):
    done = llmpack(*command.split(), "--help", env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0
    assert "Usage: " in done.stdout
    assert "Traceback" not in done.stderr
    if command not in ("cache", "device"):
        assert "--json" in done.stdout


def test_the_version_is_the_packages():
    from llmpack import __version__

    assert llmpack("--version").stdout == f"llmpack {__version__}\n"


@pytest.mark.parametrize("arguments", [("nothing",), ("plan",), ("plan", "r.toml", "--nothing"), ()])
def test_a_wrong_command_line_is_exit_2(arguments):
    assert llmpack(*arguments).returncode == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError("x"), 2),
        (errors.RecipeError(["a", "b"]), 3),
        (errors.BudgetMissed("x"), 4),
        (errors.InputRejected(["x"]), 5),
        (errors.MissingExtra("torch", "build"), 6),
        (errors.StepFailed("x"), 7),
        (errors.RuntimeFailed("x"), 7),
        (errors.VerificationFailed(["x"]), 8),
        (errors.LicenceProblem("x"), 9),
        (errors.Busy("x"), 75),
        (OSError(28, "No space left on device", "/x"), 6),
        (MemoryError(), 6),
        (KeyboardInterrupt(), 130),
        (Terminated(), 143),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_ending_has_its_code_and_no_traceback(error, code, capsys):
    def command():
        raise error

    assert conduct(Session(), command) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("llmpack: ")
    assert "Traceback" not in captured.err


def test_debug_shows_where_an_error_came_from(capsys):
    def command():
        raise errors.StepFailed("x")

    assert conduct(Session(debug=True), command) == 7
    assert "Traceback" in capsys.readouterr().err


def test_json_errors_are_one_document_with_every_problem(capsys):
    problem = errors.Problem("unknown key", path="step.0.x", where="r.toml:3:1", rule="G1")

    def command():
        raise errors.RecipeError([problem, "plain"])

    assert conduct(Session(json=True), command) == 3
    found = json.loads(capsys.readouterr().out)["error"]
    assert found["kind"] == "RecipeError"
    assert found["exit_code"] == 3
    assert found["problems"] == [
        {"message": "unknown key", "path": "step.0.x", "where": "r.toml:3:1", "rule": "G1"},
        {"message": "plain"},
    ]


def test_an_error_without_problems_has_none():
    assert "problems" not in describe(errors.StepFailed("x"))["error"]


PROGRAM = """
    import sys, time, typer
    from llmpack.cli.command import command
    from llmpack.cli.session import Session
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    @command
    def wait(session: Session) -> None:
        print("waiting", flush=True)
        time.sleep(60)

    @app.command()
    @command
    def fail(session: Session) -> None:
        raise ZeroDivisionError("by zero")

    app()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_command_cleanly(number, code):
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), "wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "waiting\n"
    time.sleep(0.05)
    child.send_signal(number)
    _, err = child.communicate(timeout=20)
    assert child.returncode == code
    assert "the same command goes on from there" in err
    assert "Traceback" not in err


def test_a_bug_asks_to_be_reported_and_shows_itself_only_when_asked():
    program = [sys.executable, "-c", textwrap.dedent(PROGRAM), "fail"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 1
    assert "this is a bug: ZeroDivisionError: by zero" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in subprocess.run([*program, "--debug"], capture_output=True, text=True).stderr


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m llmpack list encodings | true", shell=True, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr
    assert "bug" not in done.stderr
