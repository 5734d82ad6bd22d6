"""`llmpack check` as a pipeline uses it: any file, no recipe, no torch, and reports that a CI server reads."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from command_line import command_line
from tiny_gguf import write_tiny_gguf

from llmpack.cli import gate
from llmpack.errors import InputRejected
from llmpack.target.budget import Budget, judge
from llmpack.target.device import device
from llmpack.target.profile_text import profile_text

ROOT = Path(__file__).parents[2]
TERMS = '[target]\naccept = "estimate"\n[runtime]\nkv = "q8_0"\n[budget]\nmemory = "350 MiB"\ncontext = 256\n'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("check") / "tiny.gguf")


@pytest.fixture
def check(model, tmp_path, monkeypatch, capsys):
    """Run the command in this process: exit code, stdout, stderr."""
    run = command_line(monkeypatch, capsys, tmp_path / "cache", "check")
    return lambda *arguments, path=model: run(path, *arguments)


def rows(out, device=0):
    return {row["limit"]: row for row in json.loads(out)["verdicts"][device]["rows"]}


def test_a_header_passes_only_where_estimates_are_accepted(check):
    asked = ("--budget", "memory=350 MiB", "--budget", "context=256", "--estimate-only", "--json")
    code, out, _ = check(*asked)
    assert code == 4
    assert rows(out)["memory"]["status"] == "UNMEASURED"
    code, out, _ = check(*asked, "--accept", "estimate")
    assert code == 0
    assert json.loads(out)["measured"] is False
    assert rows(out)["memory"]["evidence"]["kind"] == "estimate"
    assert check(*asked, "--accept", "estimate", "--budget", "memory=1 MiB")[0] == 4


def test_a_header_alone_is_read(check, tmp_path):
    code, out, _ = check("--budget", "memory=350 MiB", "--budget", "context=256", "--estimate-only")
    assert code == 4
    assert "from its header alone" in out
    assert not (tmp_path / "cache").exists()


def test_it_measures_where_the_device_is_this_machine(check):
    asked = ("--budget", "memory=500 MiB", "--budget", "context=64", "--set", "runtime.threads=1", "--json")
    code, out, _ = check(*asked)
    assert code == 0
    assert json.loads(out)["measured"] is True
    assert rows(out)["memory"]["evidence"]["kind"] == "measurement"
    assert rows(out)["memory"]["evidence"]["settings"]["threads"] == 1


def test_a_budget_file_holds_all_terms_and_limits_go_before_it(check, tmp_path):
    terms = tmp_path / "budget.toml"
    terms.write_text(TERMS)
    code, out, _ = check("--budget", terms, "--estimate-only", "--json")
    assert code == 0
    assert json.loads(out)["estimates"][0]["settings"]["kv"] == "q8_0"
    assert rows(out)["memory"]["bound"] == 350 << 20
    code, out, _ = check(
        "--budget", terms, "--budget", "memory=1 MiB", "--budget", "ttft=1 s", "--estimate-only", "--json"
    )
    assert code == 4
    assert rows(out)["memory"]["bound"] == 1 << 20
    assert rows(out)["first_token"]["bound"] == 1.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[budget]\nmemroy = '1 GiB'\nmemory = '2G'\n", ("budget.toml:2:1", "did you mean `memory`", "GB or GiB")),
        ("[step]\n", ("unknown key `step`",)),
        ("memory = '1 GiB'\n", ("unknown key `memory`",)),
        ("[budget\n", ("budget.toml:1",)),
    ],
)
def test_every_problem_of_a_budget_file_has_its_place(check, tmp_path, text, words):
    (tmp_path / "budget.toml").write_text(text)
    code, out, err = check("--budget", tmp_path / "budget.toml")
    assert (code, out) == (3, "")
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "no limit is declared"),
        (("--budget", "memory=1 GiB", "--device", "rasberry-pi-5-8gb"), 3, "did you mean `raspberry-pi-5-8gb`"),
        (("--budget", "memory=1 GiB", "--device", "nowhere.toml"), 3, "nowhere.toml cannot be read"),
        (("--budget", "memory=64 GiB", "--device", "raspberry-pi-5-8gb"), 3, "more than the 8 GiB"),
        (("--budget", "memory=1 GiB", "--budget", "context=9999"), 3, "beyond the 512 tokens"),
        (("--budget", "decode=8"), 3, "8 has no unit"),
        (("--budget", "nothing.toml"), 3, "nothing.toml: cannot be read"),
        (("--budget", "memory=1 GiB", "--accept", "estimat"), 3, "did you mean `estimate`"),
        (("--budget", "memory=1 GiB", "--junit", "/nowhere/at/all.xml"), 2, "there is no folder /nowhere/at"),
    ],
)
def test_what_cannot_be_judged_says_why(check, arguments, code, words):
    ended, out, err = check(*arguments)
    assert (ended, out) == (code, "")
    assert words in err


def test_quality_of_a_bare_file_is_unmeasured_with_the_reason(check):
    code, out, _ = check("--budget", "quality.kl=0.1", "--budget", "disk=1 GB", "--budget", "context=64", "--json")
    assert code == 4
    assert rows(out)["disk"]["status"] == "PASS"
    assert "does not tell which model it was made from" in rows(out)["quality.kl"]["reason"]


def test_a_verdict_for_each_device(check):
    two = ("--device", "raspberry-pi-5-8gb", "--device", "steam-deck")
    code, out, _ = check("--budget", "memory=1 GiB", "--budget", "context=256", *two, "--accept", "estimate", "--json")
    assert code == 0
    assert [v["device"] for v in json.loads(out)["verdicts"]] == ["raspberry-pi-5-8gb", "steam-deck"]
    assert {rows(out, index)["memory"]["status"] for index in (0, 1)} == {"PASS"}


def test_a_profile_that_promises_more_than_this_machine_has_is_an_error(check, tmp_path):
    here = device("host")
    profile = here.model_copy(
        update={
            "figures": here.figures.model_copy(
                update={"memory": here.figures.memory.model_copy(update={"value": 4 * here.memory})}
            )
        }
    )
    file = tmp_path / "large.toml"
    file.write_text(profile_text(profile, "2026"))
    code, _, err = check("--budget", "memory=300 MiB", "--budget", "context=64", "--device", file)
    assert code == 6
    assert re.search(r"this machine has .* of memory, large says .*device probe", err)


def test_junit_has_a_case_for_each_limit(check, tmp_path):
    report = tmp_path / "verdict.xml"
    limits = ("--budget", "memory=350 MiB", "--budget", "disk=1 kB", "--budget", "load=1 s", "--budget", "context=64")
    code, _, _ = check(*limits, "--estimate-only", "--accept", "estimate", "--junit", report)
    assert code == 4
    (suite,) = ElementTree.parse(report).getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "1", "1")
    found = {case.get("name"): [child.tag for child in case] for case in suite}
    assert found == {"memory": ["system-out"], "disk": ["failure"], "load": ["error"]}


def test_a_damaged_file_is_an_error_in_the_report_too(check, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    code, _, _ = check("--budget", "memory=1 GiB", "--junit", tmp_path / "v.xml", path=broken)
    assert code == 5
    (suite,) = ElementTree.parse(tmp_path / "v.xml").getroot()
    assert suite[0][0].get("type") == "InputRejected"


def test_letters_that_xml_cannot_hold_are_replaced():
    document = gate.error_document(Path("a\x01b"), InputRejected(["bad \x00 name <&>"]))
    assert ElementTree.fromstring(document)[0].get("name") == "a\N{REPLACEMENT CHARACTER}b"


def test_github_gets_annotations_and_a_summary(check, tmp_path, monkeypatch):
    page = tmp_path / "summary.md"
    page.write_text("before\n")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    limits = ("--budget", "memory=350 MiB", "--budget", "disk=1 kB", "--budget", "context=64")
    code, out, err = check(*limits, "--estimate-only", "--accept", "estimate", "--json")
    assert code == 4
    json.loads(out)  # annotations stay out of it
    (line,) = [line for line in err.splitlines() if line.startswith("::error ")]
    assert line.startswith("::error title=disk on host%3A FAIL,file=")
    assert "%25 short" in line
    text = page.read_text()
    assert text.startswith("before\n### FAIL: ")
    assert "| memory | <= 350 MiB |" in text


def test_annotations_are_one_line():
    line = gate.annotation("a: b, c", "100 %\nnext", Path("x,y.gguf"))
    assert line == "::error title=a%3A b%2C c,file=x%2Cy.gguf::100 %25%0Anext"


def test_a_summary_escapes_what_would_break_its_table():
    verdict = judge(Budget(prefill="1 tok/s"), [], device("steam-deck"), missing={"prefill": "a | b"})
    assert "a \\| b" in gate.summary(Path("m.gguf"), (verdict,))


def test_it_loads_no_torch(model, tmp_path):
    code = f"""
import sys
from llmpack.cli.main import main
sys.argv = ["llmpack", "check", {str(model)!r}, "--budget", "memory=500 MiB", "--budget",
    "context=64", "--set", "runtime.threads=1"]
try:
    main()
except SystemExit as end:
    assert end.code == 0, end.code
heavy = {{"torch", "transformers", "llama_cpp"}} & set(sys.modules)
assert not heavy, heavy
"""
    environment = {**os.environ, "LLMPACK_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("limit", "code"), [("350 MiB", 0), ("1 MiB", 4)])
def test_the_script_for_pipelines(model, tmp_path, limit, code):
    (tmp_path / "budget.toml").write_text(TERMS.replace("350 MiB", limit))
    program = tmp_path / "bin" / "llmpack"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m llmpack "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "OUT": str(tmp_path)}
    command = [ROOT / "scripts/budget-check", model, tmp_path / "budget.toml", "--estimate-only"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stderr
    assert rows((tmp_path / "verdict.json").read_text())["memory"]["status"] == ("FAIL" if code else "PASS")
    assert ElementTree.parse(tmp_path / "verdict.xml").getroot().tag == "testsuites"
