"""The README says what the program does: its reference is generated, its commands and files exist."""

import re
import subprocess
import sys
from pathlib import Path

from llmpack import errors
from llmpack.cli.main import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_recipe_reference_is_current():
    assert subprocess.run([sys.executable, ROOT / "scripts/readme", "--check"], check=False).returncode == 0


def test_every_command_has_a_line():
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    names |= {group.name for group in app.registered_groups}
    missing = [name for name in names if f"`llmpack {name}" not in README]
    assert len(names) > 8
    assert missing == []


def test_every_exit_code_has_a_line():
    codes = {e.exit_code for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.LlmpackError)}
    rows = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", README, re.MULTILINE) for code in row.split(",")}
    assert codes - {1} <= rows


def test_every_script_and_recipe_that_is_named_exists():
    named = set(re.findall(r"`?((?:scripts|recipes)/[\w./-]+)", README))
    assert {"scripts/quickstart", "scripts/test", "recipes/quickstart.toml"} <= named
    assert [name for name in named if not (ROOT / name.rstrip(".")).exists()] == []


def test_no_figure_is_still_to_be_filled_in():
    assert "@@" not in README
