"""The command line, run in this process; each file of tests has a `place` of its own with models and a cache."""

from __future__ import annotations

import pytest
from command_line import command_line


@pytest.fixture
def llmpack(place, monkeypatch, capsys):
    """Run a command in this process: exit code, stdout, stderr."""
    return command_line(monkeypatch, capsys, place / "cache")
