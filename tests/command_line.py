"""Running `llmpack` in the process of a test."""

from __future__ import annotations

import sys

import pytest

from llmpack.cli.main import main


def command_line(monkeypatch, capsys, cache, *first):
    """A function that runs a command, with what comes `first` in it: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["llmpack", *map(str, (*first, *arguments))])
        monkeypatch.setenv("LLMPACK_CACHE", str(cache))
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err, captured.err[-3000:]
        return int(end.value.code or 0), captured.out, captured.err

    return run
