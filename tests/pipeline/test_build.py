"""The whole road on a small model: what is made, made again, killed, missed and broken."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager

import pytest
from small_recipe import RECIPE, SHORT

from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.digest import sha256_file
from llmpack.errors import (
    BudgetMissed,
    Busy,
    RecipeError,
    StepFailed,
    UsageError,
    VerificationFailed,
)
from llmpack.formats.gguf import GgufFormat
from llmpack.pipeline.build import STAGES, build_bundle
from llmpack.pipeline.cache import Cache
from llmpack.pipeline.check import Question, check
from llmpack.pipeline.manifest import Manifest
from llmpack.pipeline.planning import plan_bundle
from llmpack.pipeline.state import Order
from llmpack.pipeline.verify import verify_bundle

pytestmark = pytest.mark.xdist_group("pipeline-build")


class Watcher:
    """Progress that remembers the titles of tasks and what was said."""

    def __init__(self):
        self.titles = []
        self.lines = []

    @contextmanager
    def task(self, title, total):
        self.titles.append(title)
        yield lambda done: None

    def say(self, message):
        self.lines.append(message)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A cache that the tests of this module share, so that a step runs once."""
    return tmp_path_factory.mktemp("shared") / "cache"


@pytest.fixture(scope="module")
def built(shared, packable):
    """The bundle of the recipe, made once."""
    recipe = shared.parent / "tiny.toml"
    recipe.write_text(RECIPE.format(model=packable))
    return build_bundle(Order(recipe, shared.parent / "out", Cache(shared), protocol=SHORT))


def left_in(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_the_program_is_a_tuple_of_stages():
    names = [stage.__name__ for stage in STAGES]
    assert names == ["read", "open_source", "plan", "run", "write", "read_back", "measure", "judge", "record"]


def test_a_build_publishes_a_whole_bundle(built):
    assert left_in(built.order.out) == ["tiny"]
    folder = built.final
    assert left_in(folder) == [
        "LICENSE", "README.md", "SHA256SUMS", "manifest.json", "model.gguf", "recipe.lock.json", "recipe.toml",
    ]  # fmt: skip
    assert (folder / "recipe.toml").read_text() == built.document.text
    assert (folder / "LICENSE").read_text() == "The licence of a tiny Llama.\n"
    assert verify_bundle(folder)["files"].keys() == set(left_in(folder)) - {"SHA256SUMS"}
    assert subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder).returncode == 0


def test_the_plan_knows_the_exact_bytes(built, order, shared):
    plan = plan_bundle(order(cache=Cache(shared))).plan
    assert plan.nbytes == (built.final / "model.gguf").stat().st_size
    assert plan.graph.nbytes == sum(t.nbytes for t in GgufFile.open(built.final / "model.gguf").tensors.values())
    assert plan.steps[0].state == "cached"
    assert plan.steps[0].key == built.steps[0].key


def test_the_manifest_says_how_it_was_made_and_what_was_found(built):
    document = json.loads((built.final / "manifest.json").read_text())
    manifest = Manifest.read(document, "manifest.json")
    made = manifest.made
    assert made["artifact"]["sha256"] == sha256_file(built.final / "model.gguf")
    assert made["artifact"]["file"] == built.summary()["model"]["file"] == "model.gguf"
    assert made["source"]["digest"] == built.origin.checkpoint.digest
    assert made["source"]["licence"][0]["id"] == "apache-2.0"
    assert made["steps"][0]["key"] == built.steps[0].key
    assert set(made["corpora"]) == {"calibration", "evaluation"}
    assert made["recipe"]["step"][0]["damping"] > 0
    assert manifest.observed.verdict.passes
    assert {row.limit for row in manifest.observed.verdict.rows} == {"memory", "disk", "quality.kl", "quality.top1"}
    assert {"quality", "measurement", "fidelity"} == set(manifest.observed.reports)
    text = json.dumps(document["made"])
    for secret in (str(built.order.recipe.parent), os.uname().nodename):
        assert secret not in text.replace(built.recipe.source.model, "")


def test_the_disk_row_counts_the_whole_bundle(built):
    row = next(row for row in built.verdict.rows if row.limit == "disk")
    sizes = [path.stat().st_size for path in built.final.iterdir()]
    assert row.value == sum(-(-size // 4096) * 4096 for size in sizes)


def test_the_same_recipe_twice_gives_the_same_bytes(built, order, tmp_path):
    first = (built.final / "model.gguf").read_bytes()
    again = build_bundle(order(cache=Cache(tmp_path / "another cache")))
    assert (again.final / "model.gguf").read_bytes() == first
    assert [step.cached for step in again.steps] == [False]
    assert again.steps[0].output == built.steps[0].output
    before, after = (json.loads((b.final / "recipe.lock.json").read_text()) for b in (built, again))
    assert before == after


def test_finished_work_is_not_done_again(built, order, shared):
    watcher = Watcher()
    again = build_bundle(order(cache=Cache(shared, progress=watcher), progress=watcher))
    assert [step.cached for step in again.steps] == [True]
    assert not [title for title in watcher.titles if title.startswith(("block", "comparing", "measuring", "hashing"))]
    assert again.verdict.passes


KILLED = """
    import os, signal, sys
    from contextlib import contextmanager
    from pathlib import Path
    from llmpack.pipeline.build import build_bundle
    from llmpack.pipeline.cache import Cache
    from llmpack.pipeline.state import Order

    class Deadly:
        count = 0
        @contextmanager
        def task(self, title, total):
            if title.startswith(sys.argv[4]):
                Deadly.count += 1
                if Deadly.count == int(sys.argv[5]):
                    os.kill(os.getpid(), signal.SIGKILL)
            yield lambda done: None
        def say(self, message):
            pass

    deadly = Deadly()
    recipe, out, cache = map(Path, sys.argv[1:4])
    build_bundle(Order(recipe, out, Cache(cache, progress=deadly), progress=deadly))
"""


@pytest.mark.parametrize(("title", "count"), [("block 0", 2), ("block 1", 1), ("writing GGUF", 1), ("reading back", 1)])
def test_a_killed_build_goes_on_and_gives_the_same_bytes(built, order, tmp_path, title, count):
    expected = (built.final / "model.gguf").read_bytes()
    out, cache = tmp_path / "killed", tmp_path / "killed cache"
    command = [sys.executable, "-c", textwrap.dedent(KILLED), built.order.recipe, out, cache, title, str(count)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "tiny" not in left_in(out)
    watcher = Watcher()
    asked = order(cache=Cache(cache, progress=watcher), progress=watcher)
    again = build_bundle(asked)
    assert (again.final / "model.gguf").read_bytes() == expected
    repeated = [each for each in watcher.titles if each.startswith("block 0,")]
    assert len(repeated) == (2 if title == "block 0" else 0) or again.steps[0].cached


def test_what_a_killed_build_left_beside_the_bundle_is_cleared_away(order, shared, tmp_path):
    stale = tmp_path / "out" / ".tiny.99999.tmp"
    stale.mkdir(parents=True)
    (stale / "model.gguf").write_bytes(b"half")
    build_bundle(order(cache=Cache(shared)))
    assert left_in(tmp_path / "out") == ["tiny"]


def test_a_missed_budget_publishes_nothing_and_names_the_cure(order, shared, tmp_path):
    with pytest.raises(BudgetMissed) as caught:
        build_bundle(order("budget.quality.kl=0.000001", cache=Cache(shared)))
    assert left_in(tmp_path / "out") == []
    rows = {row.limit: row for row in caught.value.verdict.rows}
    assert rows["quality.kl"].status == "FAIL"
    assert rows["memory"].status == "PASS"
    assert "1 of 4 limits missed" in str(caught.value)
    watcher = Watcher()
    relaxed = build_bundle(order(cache=Cache(shared, progress=watcher), progress=watcher))
    assert relaxed.verdict.passes
    assert "comparing with the source" not in watcher.titles


def test_a_plan_that_cannot_fit_stops_before_the_first_step(order, tmp_path):
    watcher = Watcher()
    with pytest.raises(BudgetMissed, match="the plan misses the budget before anything is built") as caught:
        build_bundle(order("budget.disk=2 MB", cache=Cache(tmp_path / "empty", progress=watcher), progress=watcher))
    row = next(row for row in caught.value.verdict.rows if row.limit == "disk")
    assert row.status == "FAIL"
    assert "saves" in row.cure
    assert watcher.titles == []


def test_another_device_passes_only_where_estimates_are_accepted(order, shared, tmp_path):
    there = "target.device=raspberry-pi-5-8gb"
    with pytest.raises(BudgetMissed, match="1 not measured") as caught:
        build_bundle(order(there, cache=Cache(shared)))
    assert {row.limit: row.status for row in caught.value.verdict.rows}["memory"] == "UNMEASURED"
    accepted = build_bundle(order(there, "target.accept=estimate", cache=Cache(shared)))
    assert accepted.verdict.on_estimates
    assert any("nothing was measured on raspberry-pi-5-8gb" in note for note in accepted.observed.notes)
    assert "nothing was measured" in (accepted.final / "README.md").read_text()


def test_several_devices_are_judged_from_one_build(order, shared, tmp_path):
    both = 'target.devices=["host", "raspberry-pi-5-8gb"]'
    with pytest.raises(BudgetMissed) as caught:
        build_bundle(order(both, cache=Cache(shared)))
    here, there = caught.value.verdicts
    assert (here.device, here.passes) == ("host", True)
    assert (there.device, there.passes) == ("raspberry-pi-5-8gb", False)
    assert {row.limit: row.status for row in there.rows}["memory"] == "UNMEASURED"
    made = build_bundle(order(both, "target.accept=estimate", cache=Cache(shared)))
    assert [verdict.passes for verdict in made.observed.verdicts] == [True, True]
    assert made.steps[0].cached
    card = (made.final / "README.md").read_text()
    assert "| limit | wanted | host | raspberry-pi-5-8gb |" in card
    assert re.search(r"\| memory \| <= 600 MiB \| [\d.]+ MiB PASS \| [\d.]+ MiB PASS \(estimate\) \|", card)
    again = check(made.final, Cache(shared), Question())
    assert [verdict.device for verdict in again.verdicts] == ["host", "raspberry-pi-5-8gb"]
    assert (again.passed, again.measured) == (True, False)


def test_a_file_that_does_not_read_back_is_deleted(order, shared, tmp_path, monkeypatch):
    write = GgufFormat.write

    def damaged(self, checkpoint, graph, path, facts, progress):
        container = write(self, checkpoint, graph, path, facts, progress)
        with path.open("r+b") as file:
            file.seek(-40_000, os.SEEK_END)
            byte = file.read(1)
            file.seek(-40_000, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))
        return container

    monkeypatch.setattr(GgufFormat, "write", damaged)
    with pytest.raises(VerificationFailed, match="rows are not those of"):
        build_bundle(order(cache=Cache(shared)))
    assert left_in(tmp_path / "out") == []


def test_a_step_that_breaks_its_promise_is_found_out(order, tmp_path, monkeypatch):
    from llmpack.steps.quantize_gptq import QuantizeGptq

    run = QuantizeGptq.run

    def other(self, checkpoint, graph, bench):
        return run(self.model_copy(update={"encoding": "q8_0"}), checkpoint, graph, bench)

    monkeypatch.setattr(QuantizeGptq, "run", other)
    with pytest.raises(StepFailed, match="made something else than its preview promised"):
        build_bundle(order(cache=Cache(tmp_path / "cache")))


def test_something_else_in_the_bundles_place_is_left_alone(order, shared, tmp_path):
    (tmp_path / "out" / "tiny").mkdir(parents=True)
    (tmp_path / "out" / "tiny" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="is no bundle"):
        build_bundle(order(cache=Cache(shared)))
    assert (tmp_path / "out" / "tiny" / "thesis.txt").read_text() == "years of work"


def test_a_bundle_that_is_being_built_is_busy(order, shared, tmp_path):
    final = (tmp_path / "out" / "tiny").absolute()
    holder = f"""
        import sys, time
        from pathlib import Path
        from llmpack.pipeline.build import reserved
        from llmpack.pipeline.cache import Cache
        with reserved(Cache(Path({str(shared)!r})), Path({str(final)!r})):
            print("held", flush=True)
            time.sleep(60)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(holder)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    try:
        with pytest.raises(Busy, match=f"is being worked on by process {child.pid}"):
            build_bundle(order(cache=Cache(shared, wait=False)))
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_evaluation_text_must_be_unseen(order, tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"the {i} word of {i * i}\n" for i in range(4000)))
    (tmp_path / "b.txt").write_text((tmp_path / "a.txt").read_text())
    overrides = ('calibration.text=["a.txt"]', 'evaluation.text=["b.txt"]')
    cache = Cache(tmp_path / "cache")
    for _ in range(2):  # what was looked at once and refused is not taken the next time
        with pytest.raises(RecipeError, match="of the evaluation text is calibration text too"):
            build_bundle(order(*overrides, cache=cache))
    assert not (cache.root / "step").exists()


def test_texts_that_are_too_short_are_told_at_once_before_any_step(order, tmp_path):
    cache = Cache(tmp_path / "cache")
    with pytest.raises(RecipeError) as caught:
        build_bundle(order("calibration.tokens=9_000_000", "evaluation.tokens=8_000_000", cache=cache))
    assert [problem.path for problem in caught.value.problems] == ["calibration.text", "evaluation.text"]
    assert not (cache.root / "step").exists()


def test_a_recipe_without_steps_converts(order, recipe_file, shared):
    text = recipe_file.read_text()
    start, end = text.index("[[step]]"), text.index("[evaluation]")
    recipe_file.write_text(text[:start] + text[end:])
    made = build_bundle(order("budget.disk=12 MB", cache=Cache(shared)))
    assert made.steps == ()
    assert set(GgufFile.open(made.final / "model.gguf").encodings) == {"f16", "f32"}
    assert made.reports["quality"]["mean"] < 0.01


def test_overrides_are_in_the_lock(order, shared):
    made = build_bundle(order("step.0.encoding=q4_0", cache=Cache(shared)))
    lock = json.loads((made.final / "recipe.lock.json").read_text())
    assert lock["overrides"] == ["step.0.encoding=q4_0"]
    assert GgufFile.open(made.final / "model.gguf").encodings["q4_0"] == 14


def test_a_step_that_needs_more_than_the_recipe_allows_is_refused_before_anything_runs(order, tmp_path):
    watcher = Watcher()
    with pytest.raises(RecipeError, match=r"(?s)build\.memory.*16 MiB is too little.* memory = \"\d+ MiB\"") as caught:
        build_bundle(order("build.memory=16 MiB", cache=Cache(tmp_path / "cache"), progress=watcher))
    assert caught.value.exit_code == 3
    assert watcher.titles == []
    assert left_in(tmp_path / "out") == []
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY


def test_interrupting_a_build_is_clean_and_its_work_is_kept(built, order, tmp_path):
    cache = tmp_path / "cache"
    command = [
        sys.executable,
        "-m",
        "llmpack",
        "build",
        built.order.recipe,
        "--out",
        tmp_path / "out",
        "--cache",
        cache,
    ]
    child = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not list(cache.glob("step/*/content/block-0000.safetensors")) and time.monotonic() < until:
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert left_in(tmp_path / "out") == []
    watcher = Watcher()
    again = build_bundle(order(cache=Cache(cache, progress=watcher), progress=watcher))
    assert again.artifact.sha256 == built.artifact.sha256
