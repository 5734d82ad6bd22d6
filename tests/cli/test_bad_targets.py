"""Devices and budgets that cannot be, told by every command that meets them, with one exit code for each kind."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_recipe import RECIPE
from tiny_gguf import write_tiny_gguf

TWIN = (Path(__file__).parents[1] / "target" / "twin.toml").read_text()
IMPOSSIBLE = '{}\n[figures.cores]\nvalue = 0\nprovenance = "datasheet"\nsource = "made up for a test"\n'


@pytest.fixture(scope="module")
def place(tmp_path_factory, packable):
    """A recipe, a model file, and the profile of a machine that cannot be."""
    folder = tmp_path_factory.mktemp("targets")
    (folder / "tiny.toml").write_text(RECIPE.format(model=packable))
    write_tiny_gguf(folder / "tiny.gguf")
    (folder / "impossible.toml").write_text(IMPOSSIBLE.format(TWIN))
    return folder


DEVICES = [
    ("rasberry-pi-5-8gb", "unknown device `rasberry-pi-5-8gb`; did you mean `raspberry-pi-5-8gb`"),
    ("impossible.toml", "0 is impossible for cores; it lies between 1 and 4096"),
    ("absent.toml", "absent.toml cannot be read"),
]
LIMITS = [
    ("budget.memory=2G", "G is not a unit of size"),
    ("budget.memory=8 tok/s", "not a unit of size"),
    ("budget.decode=350 MiB", "not a rate"),
    ("budget.disk=1000", "has no unit"),
    ("budget.load=3 GB", "not a unit of time"),
    ("budget.context=2k", "expected a whole number"),
    ("budget.context=9999", "a context of 9999 is beyond the 512 tokens that the model was trained for"),
    ("budget.memory=900 TiB", "more than the"),
]


def refused(answer, words):
    code, out, err = answer
    assert (code, out) == (3, "")
    assert words in err


@pytest.mark.parametrize(("name", "words"), DEVICES)
def test_devices_that_cannot_be(llmpack, place, name, words, monkeypatch):
    monkeypatch.chdir(place)
    refused(llmpack("plan", "tiny.toml", "--set", f"target.device={name}"), words)
    refused(llmpack("build", "tiny.toml", "--set", f"target.device={name}"), words)
    refused(llmpack("check", "tiny.gguf", "--budget", "disk=1 GB", "--budget", "context=64", "--device", name), words)
    refused(llmpack("device", "show", name), words)


@pytest.mark.parametrize(("change", "words"), LIMITS)
def test_budgets_that_cannot_be(llmpack, place, change, words):
    refused(llmpack("plan", place / "tiny.toml", "--set", change), words)
    limits = ("--budget", "disk=1 GB", "--budget", change.removeprefix("budget."))
    refused(llmpack("check", place / "tiny.gguf", *limits), words)
