"""The command line, run in this process; each file of tests has a `place` of its own with models and a cache."""

from __future__ import annotations

import sys

import pytest

from llmpack.cli.main import main


@pytest.fixture
def llmpack(place, monkeypatch, capsys):
    """Run a command in this process: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["llmpack", *map(str, arguments)])
        monkeypatch.setenv("LLMPACK_CACHE", str(place / "cache"))
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return int(end.value.code or 0), captured.out, captured.err

    return run
