"""`llmpack check --on` and `device probe --on`, end to end: the device has processes and an environment of its own."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from command_line import command_line
from loopback import device, home, host_key, light_install  # noqa: F401 - fixtures
from tiny_gguf import write_tiny_gguf

from llmpack.digest import sha256_file
from llmpack.pipeline.remote import contradictions
from llmpack.target.device import device as profile
from llmpack.target.probe import probe_host
from llmpack.target.profile_text import profile_text
from llmpack.units import format_size

ASKED = ("--budget", "memory=500 MiB", "--budget", "context=64", "--set", "runtime.threads=1", "--json")
BENCH = json.loads((Path(__file__).parent / "llama_bench.json").read_text())


@pytest.fixture
def model(tmp_path):
    return write_tiny_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def llmpack(device, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Run a command on this machine: exit code, stdout, stderr."""
    return command_line(monkeypatch, capsys, tmp_path / "cache")


def rows(out):
    return {row["limit"]: row for row in json.loads(out)["verdicts"][0]["rows"]}


def test_a_model_is_measured_on_the_device(llmpack, device, model):  # noqa: F811
    device.install_llmpack()
    assert not {"torch", "transformers"} & light_install().keys()
    device.break_after = 100_000  # the connection breaks while the model is sent
    code, out, err = llmpack("check", model, "--on", device.address, *ASKED)
    assert code == 0, err
    assert "connecting again" in err
    memory = rows(out)["memory"]
    assert memory["evidence"]["kind"] == "measurement"
    assert memory["evidence"]["artifact"] == sha256_file(model)
    assert memory["evidence"]["machine"].endswith(f"at {device.address}")
    assert memory["evidence"]["device"] == probe_host().fingerprint
    assert "held to 500 MiB" in memory["reason"]
    document = json.loads(out)
    assert (document["on"], document["measured"]) == (device.address, True)
    assert document["verdicts"][0]["device"] == device.address
    assert [path.name for path in device.models.glob("*.gguf")] == [f"{sha256_file(model)}.gguf"]
    asked = len(device.commands)
    code, out, _ = llmpack("check", model, "--on", device.address, *ASKED)
    assert code == 0
    assert len(device.commands) == asked + 2  # looked at and identified; nothing is pushed or measured again


def test_a_budget_that_is_too_small_fails_there(llmpack, device, model):  # noqa: F811
    device.install_llmpack()
    small = ("--budget", "memory=10 MiB", *ASKED[2:])
    code, out, _ = llmpack("check", model, "--on", device.address, *small)
    assert code == 4
    assert rows(out)["memory"]["status"] == "FAIL"


def test_the_device_must_be_what_it_is_declared_to_be(llmpack, device, model):  # noqa: F811
    device.install_llmpack()
    code, _, err = llmpack("check", model, "--on", device.address, "--device", "apple-m4-16gb", *ASKED)
    assert code == 6
    assert "is not a apple-m4-16gb: it is x86_64, not aarch64" in err or "aarch64" in err
    here = probe_host()
    more = here.figures.memory.model_copy(update={"value": 4 * here.memory})
    figures = here.figures.model_copy(update={"memory": more})
    (device.home / "large.toml").write_text(profile_text(here.model_copy(update={"figures": figures}), "2026"))
    code, _, err = llmpack("check", model, "--on", device.address, "--device", device.home / "large.toml", *ASKED)
    assert code == 6
    assert f"it has {format_size(here.memory)} of memory, not {format_size(4 * here.memory)}" in err
    assert not list(device.models.glob("*.gguf"))


def test_contradictions_are_all_named():
    wanted = profile("jetson-agx-orin-64gb")
    found = profile("raspberry-pi-4-4gb")
    text = "; ".join(contradictions(wanted, found))
    assert all(word in text for word in ("4 GiB of memory", "4 cores, not 12", "lacks dotprod, fp16"))
    assert contradictions(wanted, wanted) == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--estimate-only",), 2, "give one of them"),
        (("--device", "laptop-8gb", "--device", "host"), 2, "say which with --device"),
        (("--device", "laptop-8bg"), 3, "did you mean `laptop-8gb`"),
        (("--budget", "memory=900 TiB"), 3, "more than the"),
        ((), 6, "neither llmpack with llama-cpp-python nor a llama-bench"),
    ],
)
def test_what_cannot_be_is_told(llmpack, device, model, arguments, code, words):  # noqa: F811
    found, out, err = llmpack("check", model, "--on", device.address, *ASKED[:-1], *arguments)
    assert (found, out) == (code, "")
    assert words in err


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("echo '{\"format\": 1'", "does not understand"),
        ("echo hello; exit 1", "is it the same version"),
        ("printf '\\033[2J{}'", "'[2J{}'"),
        ('echo \'{"error": {"kind": "EnvironmentProblem", "message": "no \\u001b[2Jmemory"}}\'', "no [2Jmemory"),
    ],
)
def test_garbage_is_no_answer(llmpack, device, model, program, words):  # noqa: F811
    device.program("llmpack", f"#!/bin/sh\ncat > /dev/null\n{program}\n")
    code, out, err = llmpack("check", model, "--on", device.address, *ASKED[:-1])
    assert code in (6, 7)
    assert out == ""
    assert words in err
    assert "\x1b" not in err


def bench_program(device, text="cat {answer}", seconds=0.1):  # noqa: F811
    """A llama-bench that tells what the real one (build 0c1e570) told, once for each shape."""
    for name in ("prompt", "decode", "help"):
        (device.home / name).write_text(BENCH[name] if name == "help" else json.dumps([BENCH[name]]))
    answer = f'{device.home}/$(case "$*" in *"-p 0 "*) echo decode;; *) echo prompt;; esac)'
    device.program(
        "llama-bench",
        f'#!/bin/sh\n[ "$1" = --help ] && exec cat {device.home}/help\n'
        f'echo "$*" >> {device.home}/asked\nsleep {seconds}\n{text.format(answer=answer)}\n',
    )


def test_a_device_without_python_is_measured_by_llama_bench(llmpack, device, model):  # noqa: F811
    limits = ("--budget", "decode=1 tok/s", "--budget", "ttft=60 s", "--budget", "load=1 s", "--set", "runtime.kv=q8_0")
    BENCH["prompt"]["type_k"] = BENCH["decode"]["type_k"] = "q8_0"
    bench_program(device, seconds=1.6)
    _, out, _ = llmpack("check", model, "--on", device.address, *ASKED, *limits)
    found = rows(out)
    assert found["memory"]["status"] == "PASS"
    assert found["memory"]["value"] > 100 << 10  # of a shell
    assert found["memory"]["reason"].endswith("held to 500 MiB by a watch on resident memory")
    rates = [1e9 * 16 / ns for ns in BENCH["decode"]["samples_ns"]]
    assert min(rates) <= found["decode"]["value"] <= max(rates)
    assert found["decode"]["evidence"]["build"] == {"llama.cpp": "0c1e570"}
    assert found["load"]["status"] == "UNMEASURED"
    asked = (device.home / "asked").read_text().splitlines()
    common = "-o json -ngl 0 -t 1 -b 512 -ub 512 -ctk q8_0 -ctv q8_0 -fa 1 --progress -r 5"
    assert [line.partition(".gguf ")[2] for line in asked] == [
        f"{common} -p 48 -n 0",
        f"{common} -p 0 -n 16 -d 48",
    ]


def test_a_llama_bench_that_wants_more_than_the_budget_ends_in_a_verdict(llmpack, device, model):  # noqa: F811
    hungry = f"exec {sys.executable} -c 'import time; held = [0] * (8 << 20); time.sleep(60)'"
    bench_program(device, f"{hungry} # {{answer}}")
    code, out, err = llmpack("check", model, "--on", device.address, "--budget", "memory=40 MiB", *ASKED[2:])
    assert code == 4, err
    row = rows(out)["memory"]
    assert (row["status"], row["evidence"]["kind"]) == ("FAIL", "measurement")
    assert row["value"] > 40 << 20
    assert "more: ended when" in row["reason"]
    assert (device.home / "asked").read_text().count("\n") == 1  # it is not tried again in another shape


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo nonsense", "what is no result"),
        ("echo '[{{}}]'", "what is no result"),
        ("echo failed to load model >&2; exit 1", "failed to load model"),
        ("sed s/samples_ns/samples/ {answer}", "what is no result"),
    ],
)
def test_a_llama_bench_that_fails_gives_no_figures(llmpack, device, model, text, words):  # noqa: F811
    bench_program(device, text)
    code, out, err = llmpack("check", model, "--on", device.address, *ASKED[:-1])
    assert (code, out) == (7, "")
    assert words in err


def test_an_old_llama_bench_is_told_of(llmpack, device, model):  # noqa: F811
    device.program("llama-bench", "#!/bin/sh\necho '-o, --output'\n")
    code, _, err = llmpack("check", model, "--on", device.address, *ASKED[:-1])
    assert code == 6
    assert "does not know --n-depth, --cache-type-k" in err


def test_another_machine_is_probed(llmpack, device, tmp_path):  # noqa: F811
    code, out, err = llmpack("device", "probe", "--on", device.address, "--out", tmp_path / "there.toml")
    assert code == 0
    assert "nothing is timed" in err
    device.install_llmpack()
    code, out, err = llmpack("device", "probe", "--on", device.address, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["name"] == device.address
    assert found["figures"]["bandwidth"]["provenance"] == "measured"
    assert profile(str(tmp_path / "there.toml")).fingerprint == probe_host().fingerprint
    shutil.rmtree(device.home / "bin")
