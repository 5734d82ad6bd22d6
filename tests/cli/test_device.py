"""`llmpack device`: profiles listed and shown with their sources, and this machine probed into one."""

import json
import sys

import pytest

from llmpack.cli.main import main
from llmpack.target.device import device, device_names


@pytest.fixture
def llmpack(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["llmpack", "device", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


def test_the_list_names_every_profile(llmpack):
    code, out, _ = llmpack("list", "--json")
    assert code == 0
    assert [row["device"] for row in json.loads(out)] == device_names()
    assert all(name in llmpack("list")[1] for name in device_names())


def test_a_device_is_shown_with_its_sources_and_its_gaps(llmpack):
    code, out, _ = llmpack("show", "raspberry-pi-5-8gb")
    assert code == 0
    assert "17.1 GB/s" in out
    assert "32-bit memory at 4267 MT/s" in out
    assert [line.split() for line in out.splitlines() if line.startswith("arithmetic")] == [["arithmetic", "unknown"]]
    assert "repacked for its fastest kernels (a mapped file then stands in memory twice): iq4_nl, mxfp4, q4_0" in out
    assert json.loads(llmpack("show", "host", "--json")[1])["name"] == "host"


def test_an_unknown_device_is_exit_3_with_a_suggestion(llmpack):
    code, out, err = llmpack("show", "steam-dek")
    assert (code, out) == (3, "")
    assert "did you mean `steam-deck`?" in err


def test_a_probe_becomes_a_profile(llmpack, tmp_path):
    path = tmp_path / "board.toml"
    code, out, _ = llmpack("probe", "--out", path, "--description", "the board on the desk")
    assert code == 0
    assert out == path.read_text()
    found = device(str(path))
    assert (found.name, found.description) == ("board", "the board on the desk")
    assert found.figures.f32.provenance == "measured"
    assert len(found.figures.f32.date) == len("2026-11-24")


@pytest.mark.parametrize("name", ["board.json", "nowhere/board.toml"])
def test_a_profile_that_cannot_be_written_is_exit_2(llmpack, tmp_path, name):
    code, out, err = llmpack("probe", "--out", tmp_path / name)
    assert (code, out) == (2, "")
    assert "--out" in err
