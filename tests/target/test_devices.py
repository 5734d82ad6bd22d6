"""Device profiles and the probe of this machine."""

import platform
import tomllib
from pathlib import Path

import psutil
import pytest

import llmpack.target
from llmpack.errors import RecipeError
from llmpack.target.device import INSTRUCTION_SETS, Device, device, device_names, read_device
from llmpack.target.probe import is_this_machine, measure_bandwidth, probe_host
from llmpack.target.profile_text import profile_text

FOLDER = Path(llmpack.target.__file__).parent / "devices"
GOOD = (Path(__file__).parent / "twin.toml").read_text()


def test_every_profile_loads_and_says_where_its_figures_are_from():
    assert device_names() == sorted(p.stem for p in FOLDER.glob("*.toml"))
    assert len(device_names()) >= 6
    for name in device_names():
        found = device(name)
        assert found.name == name
        assert found.memory > 1 << 30
        raw = tomllib.loads((FOLDER / f"{name}.toml").read_text())
        for figure in raw["figures"].values():
            assert figure["provenance"] in ("measured", "datasheet")
            assert len(figure["source"]) >= 8
            assert figure["date"]
    assert len({device(name).fingerprint for name in device_names()}) == len(device_names())


def test_every_device_that_was_promised_has_a_profile():
    wanted = [
        *("raspberry-pi-4", "raspberry-pi-5", "jetson-orin-nano-8gb", "jetson-agx-orin", "rk3588", "intel-n100"),
        *("steam-deck", "snapdragon-8-gen-3", "apple-m1", "apple-m2", "apple-m3", "apple-m4", "laptop-8gb"),
    ]
    assert [name for name in wanted if not any(known.startswith(name) for known in device_names())] == []


def test_every_wrong_figure_of_a_file_is_named_at_once():
    text = extra("cores", "0") + extra("bandwidth", '"17 GB"').removeprefix(GOOD)
    with pytest.raises(RecipeError) as refusal:
        read_device("wrong", text, "wrong.toml")
    assert [problem.path for problem in refusal.value.problems] == ["figures.cores", "figures.bandwidth.value"]


def test_a_probe_is_written_as_a_profile_that_reads_back(tmp_path):
    found = probe_host(rates=True)
    assert found.figures.f32.value > 1e8
    text = profile_text(found, "2026-11-24", "a board")
    path = tmp_path / "board.toml"
    path.write_text(text)
    read = device(str(path))
    assert read.fingerprint == found.fingerprint
    assert read.figures.bandwidth.value == found.figures.bandwidth.value
    assert read.figures.memory.date == "2026-11-24"
    assert read.description == "a board"
    assert profile_text(read, "2026-11-24", "a board") == text
    assert is_this_machine(read)
    assert not is_this_machine(device("raspberry-pi-5-8gb"))


def test_an_unknown_device_gets_a_suggestion():
    with pytest.raises(RecipeError, match="did you mean `raspberry-pi-5-8gb`"):
        device("rasberry-pi-5-8gb")
    with pytest.raises(RecipeError, match="known: apple-m1"):
        device("toaster")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("1 GiB", "1 G"), "not a unit of size"),
        (("datasheet", "guess"), "measured"),
        (('"made up for a test"', '""'), "at least 8 characters"),
        (("x86_64", "z80"), "x86_64"),
        (("[figures.memory]", "[figures.memory]\nspeed = 1"), "unknown key `speed`"),
        (("[figures.memory]", "[figures.memmory]"), "(?s)figures.memory: Field required.*did you mean `memory`"),
        (("description", "= description"), "no TOML"),
    ],
)
def test_a_wrong_profile_is_refused_with_the_place(change, words):
    with pytest.raises(RecipeError, match=words) as refusal:
        read_device("wrong", GOOD.replace(*change), "wrong.toml")
    assert "wrong.toml" in str(refusal.value)


def extra(name, value):
    return f'{GOOD}\n[figures.{name}]\nvalue = {value}\nprovenance = "datasheet"\nsource = "made up for a test"\n'


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("cores", "0", "impossible"),
        ("instruction_sets", '["avx3"]', "did you mean `avx2`|did you mean `avx`"),
        ("bandwidth", '"17 GB"', "not a bandwidth"),
        ("decode_efficiency", "1.5", "impossible"),
        ("bandwidth", '"17 MB/s"', "1.7e\\+07 is impossible for bandwidth"),
        ("cache_l2", '"2 TiB"', "impossible for cache_l2"),
        ("arithmetic", '"100"', "not a rate of arithmetic"),
        ("block_overhead", '"2 s"', "impossible for block_overhead"),
        ("elementwise", '"0.00001 GFLOP/s"', "impossible for elementwise"),
    ],
)
def test_impossible_figures_are_refused(name, value, words):
    with pytest.raises(RecipeError, match=words):
        read_device("wrong", extra(name, value), "wrong.toml")


RATE = '[figures.{0}.value."{1}"]\ndecode = "{2}"\nprefill = "{3}"\n'
ROWS = 'short = "9 GB/s"\ncached = "9 GB/s"\n'


@pytest.mark.parametrize(
    ("figure", "name", "decode", "prefill", "words"),
    [
        ("kernels", "q4_0", "9 GB/s", "90 GFLOP/s", ""),
        ("kernels", "q4_9", "9 GB/s", "90 GFLOP/s", "unknown encoding 'q4_9'; did you mean `q4_"),
        ("kernels", "q4_0", "9 B/s", "90 GFLOP/s", "9 is impossible for decode of q4_0"),
        ("kernels", "q4_0", "9 GFLOP/s", "90 GFLOP/s", "GFLOP is not a unit of size"),
        ("attention", "f16@64/4", "9 GFLOP/s", "90 GFLOP/s", ""),
        ("attention", "f16", "9 GFLOP/s", "90 GFLOP/s", "no type of the KV cache with the width of a head"),
        ("attention", "f16@64/4", "9 GFLOP/s", "90000 TFLOP/s", "9e\\+16 is impossible for prefill of f16@64/4"),
    ],
)
def test_rates_of_kernels_are_possible_too(figure, name, decode, prefill, words):
    head = f'{GOOD}\n[figures.{figure}]\nprovenance = "measured"\nsource = "made up for a test"\n'
    text = head + RATE.format(figure, name, decode, prefill) + (ROWS if figure == "kernels" else "")
    if not words:
        assert getattr(read_device("right", text, "right.toml").figures, figure).value.keys() == {name}
        return
    with pytest.raises(RecipeError, match=words):
        read_device("wrong", text, "wrong.toml")


@pytest.mark.parametrize(
    ("short", "words"), [("", "short"), ('short = "9 B/s"\ncached = "9 GB/s"', "9 is impossible for short of q4_0")]
)
def test_short_rows_have_a_rate_too(short, words):
    head = f'{GOOD}\n[figures.kernels]\nprovenance = "measured"\nsource = "made up for a test"\n'
    with pytest.raises(RecipeError, match=words):
        read_device("wrong", head + RATE.format("kernels", "q4_0", "9 GB/s", "90 GFLOP/s") + short, "wrong.toml")


def test_this_machine_is_probed():
    host = device("host")
    assert host.memory <= psutil.virtual_memory().total
    assert 1 <= host.cores <= (psutil.cpu_count() or 1)
    assert set(host.instruction_sets) <= set(INSTRUCTION_SETS)
    assert host.kernel.startswith(platform.system())
    assert all(f["provenance"] == "measured" for f in host.model_dump()["figures"].values() if f)
    assert probe_host().fingerprint == host.fingerprint
    assert Device.model_validate_json(host.model_dump_json()) == host


def test_bandwidth_is_streamed():
    host = probe_host(rates=True)
    assert 1e8 < host.bandwidth < 1e13
    assert measure_bandwidth(1) > 1e8
