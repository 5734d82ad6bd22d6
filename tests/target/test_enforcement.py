"""A budget of memory that is enforced: what exceeds it ends in a row of the verdict, what keeps it passes."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import gguf
import pytest
import tiny_gguf

from llmpack.errors import RuntimeFailed
from llmpack.process import Child, Limits
from llmpack.runtime.llama import LlamaRuntime
from llmpack.runtime.meter import Watch
from llmpack.runtime.settings import RuntimeSettings, pinned_cpus, usable_cores
from llmpack.target.budget import Budget, judge
from llmpack.target.device import device
from llmpack.target.enforcement import CapExceededError, Exceeded, held, reserved_bytes
from llmpack.target.measure import Measurement, measure
from llmpack.target.memory_group import Hierarchy, MemoryGroup, memory_group
from llmpack.target.outline import Outline
from llmpack.target.protocol import Protocol

SHORT = Protocol(repetitions=1, least_seconds=0.0, rounds=1)
CONTEXT = 256
MIB = 1 << 20
CONFIG = {
    "vocab_size": 8000, "hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 3,
    "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 1024,
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A model of 60 MiB, so that 5 % of its memory is more than chance moves."""
    target = tmp_path_factory.mktemp("held") / "model.gguf"
    return tiny_gguf.write_empty_gguf(target, CONFIG, gguf.GGMLQuantizationType.F16, tied=True)


@pytest.fixture(scope="module", params=["mmap", "no-mmap"])
def settings(request):
    return RuntimeSettings(threads=1, load=request.param)


@pytest.fixture(scope="module")
def peak(path, settings):
    return measure(path, settings, CONTEXT, protocol=SHORT).memory.peak


def verdict(found, cap):
    return judge(Budget(memory=f"{cap} B", context=CONTEXT), found.findings(), device("host")).rows[0]


def test_a_budget_5_percent_below_the_peak_fails(path, settings, peak):
    cap = int(0.95 * peak)
    found = measure(path, settings, CONTEXT, cap=cap, protocol=SHORT)
    assert isinstance(found, Exceeded)
    row = verdict(found, cap)
    assert row.status == "FAIL"
    assert row.evidence.kind == "measurement"
    assert "more: ended when" in row.reason or "more: refused memory" in row.reason
    assert found.to_json()["cap"] == cap


def test_a_budget_5_percent_above_the_peak_passes(path, settings, peak):
    cap = int(1.05 * peak)
    found = measure(path, settings, CONTEXT, cap=cap, protocol=SHORT)
    assert isinstance(found, Measurement)
    row = verdict(found, cap)
    assert row.status == "PASS"
    assert "a watch on resident memory" in row.reason
    assert "RLIMIT_DATA; no cgroup was delegated" in row.reason
    assert found.to_json()["means"] == found.means


def test_a_budget_that_not_even_the_weights_fit_is_a_row_too(path):
    settings = RuntimeSettings(threads=1, load="no-mmap")
    found = measure(path, settings, CONTEXT, cap=30 * MIB, protocol=SHORT)
    assert isinstance(found, Exceeded)
    assert verdict(found, 30 * MIB).status == "FAIL"


def test_private_memory_beyond_the_limit_is_refused_before_it_is_touched(path, monkeypatch):
    """RLIMIT_DATA alone: with the watch asleep the allocation itself is refused."""
    monkeypatch.setattr("llmpack.target.measure.reserved_bytes", lambda *shape: -90 * MIB)
    monkeypatch.setattr("llmpack.runtime.meter.LIMITED_SAMPLE_SECONDS", 60.0)
    found = measure(path, RuntimeSettings(threads=1, load="no-mmap"), CONTEXT, cap=60 * MIB, protocol=SHORT)
    assert isinstance(found, Exceeded)
    assert "RLIMIT_DATA" in found.means


def test_a_failure_for_another_reason_stays_one(path):
    with pytest.raises(RuntimeFailed, match="beyond the 1024"):
        measure(path, RuntimeSettings(threads=1), 4096, cap=1 << 30, protocol=SHORT)


def test_what_llama_cpp_reserves_is_known(path, settings):
    outline = replace(outline_of(path), vocab=CONFIG["vocab_size"])
    with held(LlamaRuntime, None, (), None) as run:
        opened = run.runtime.open(path, settings, CONTEXT)
    assert run.means == ""
    assert opened.buffers["compute.CPU"] == pytest.approx(reserved_bytes(outline, settings, CONTEXT), rel=0.1)


def outline_of(path):
    from llmpack.checkpoint.gguf_file import GgufFile

    return Outline.of_gguf(GgufFile.open(path))


def test_the_child_runs_on_the_processors_that_it_is_given():
    cpus = pinned_cpus(1)
    assert len(cpus) == 1
    assert len(pinned_cpus(usable_cores())) == usable_cores()
    with Child("llmpack.runtime.llama_worker", title="llama.cpp", limits=Limits(cpus=cpus)) as child:
        deadline = time.monotonic() + 20
        while os.sched_getaffinity(child.pid) != set(cpus) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert os.sched_getaffinity(child.pid) == set(cpus)


def test_a_watch_calls_once_when_its_limit_is_broken():
    program = "import time; block = bytearray(60 << 20); block[::4096] = b'x' * len(block[::4096]); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", program])
    calls = []
    try:
        with Watch(child.pid, limit=40 * MIB, exceeded=lambda: calls.append(child.pid)) as watch:
            deadline = time.monotonic() + 20
            while not watch.broken and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)
        assert calls == [child.pid]
        assert watch.highest.peak > 40 * MIB
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()


# --- the files of a cgroup, in a folder that looks like one: groups are made on no machine that tests run on


def test_no_group_is_made_without_a_delegated_folder(tmp_path):
    assert Hierarchy.find({}) is None
    assert Hierarchy.find({"LLMPACK_CGROUP": str(tmp_path)}) is None  # no memory controller there
    (tmp_path / "cgroup.subtree_control").write_text("cpu pids\n")
    assert Hierarchy.find({"LLMPACK_CGROUP": str(tmp_path)}) is None


@pytest.mark.parametrize(
    ("file", "text", "version", "limits"),
    [
        ("cgroup.subtree_control", "cpu memory\n", 2, {"memory.max": "1048576", "memory.swap.max": "0"}),
        ("memory.limit_in_bytes", "9223372036854771712\n", 1,
         {"memory.limit_in_bytes": "1048576", "memory.memsw.limit_in_bytes": "1048576"}),
    ],
)  # fmt: skip
def test_a_group_gets_its_limits_and_the_process(tmp_path, file, text, version, limits):
    (tmp_path / file).write_text(text)
    hierarchy = Hierarchy.find({"LLMPACK_CGROUP": str(tmp_path)})
    assert hierarchy == Hierarchy(tmp_path, version)
    with memory_group(hierarchy, 4711, MIB) as group:
        assert group.folder.parent == tmp_path
        found = {name: (group.folder / name).read_text() for name in (*limits, "cgroup.procs")}
        assert found == {**limits, "cgroup.procs": "4711"}


@pytest.mark.parametrize(
    ("version", "files"),
    [
        (2, {"memory.peak": "2048\n", "memory.events": "low 0\nhigh 0\nmax 7\noom 1\noom_kill 1\n"}),
        (1, {"memory.max_usage_in_bytes": "2048\n", "memory.oom_control": "oom_kill_disable 0\noom_kill 1\n"}),
    ],
)  # fmt: skip
def test_a_group_tells_its_peak_and_its_kills(tmp_path, version, files):
    group = MemoryGroup(tmp_path, version)
    assert (group.peak, group.kills) == (None, 0)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert (group.peak, group.kills) == (2048, 1)


def test_an_error_says_what_ended_it():
    from llmpack.runtime.meter import Memory

    error = CapExceededError("ended when 3 MiB were resident", Memory(3 * MIB, MIB))
    assert str(error) == "ended when 3 MiB were resident"
    assert error.memory.peak == 3 * MIB
