"""The meter against allocations of known size."""

import os
import subprocess
import sys
import time

import pytest

from llmpack.process import child_environment
from llmpack.runtime.meter import Memory, Watch, read_memory, tree_memory

MIB = 1 << 20
GROWS = """
import sys
{setup}
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def child():
    started = []

    def start(setup):
        process = subprocess.Popen(
            [sys.executable, "-c", GROWS.format(setup=setup)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=child_environment(),
        )  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == b"ready\n"
        return process.pid

    yield start
    for process in started:
        process.communicate(b"\n", timeout=10)


def test_anonymous_memory_and_its_peak(child):
    bare = read_memory(child("pass"))
    held = read_memory(child(f"b = bytearray(b'x') * {64 * MIB}"))
    assert held.anon - bare.anon == pytest.approx(64 * MIB, rel=0.05)
    dropped = read_memory(child(f"b = bytearray(b'x') * {64 * MIB}; del b"))
    assert dropped.resident < bare.resident + 8 * MIB
    assert dropped.peak - bare.peak == pytest.approx(64 * MIB, rel=0.05)


def test_pages_of_a_file_are_counted_apart(child, tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(MIB) * 32)
    setup = (
        f"import mmap; f = open({str(path)!r}, 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); sum(m[::4096])"
    )
    bare, mapped = read_memory(child("import mmap")), read_memory(child(setup))
    assert mapped.file - bare.file == pytest.approx(32 * MIB, rel=0.05)
    assert mapped.anon - bare.anon < 2 * MIB


def test_a_tree_is_summed(child):
    code = f"b = bytearray(1) * {32 * MIB}; input()"
    grandchild = f"import subprocess; p = subprocess.Popen([sys.executable, '-c', {code!r}], stdin=subprocess.PIPE)"
    pid = child(grandchild)
    deadline = time.monotonic() + 10
    while tree_memory(pid).anon < 32 * MIB:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert read_memory(pid).anon < 32 * MIB


BREATHES = """
import sys
for word in ("held", "freed"):
    sys.stdin.readline()
    block = bytearray(b"x") * (48 << 20) if word == "held" else None
    print(word, flush=True)
sys.stdin.readline()
"""


def test_a_watch_sees_what_passed():
    with subprocess.Popen(
        [sys.executable, "-c", BREATHES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        with Watch(process.pid) as watch:
            for word in ("held", "freed"):
                process.stdin.write("\n")
                assert process.stdout.readline().strip() == word
                watch.sample()
        after = read_memory(process.pid)
        assert watch.highest.anon >= after.anon + 40 * MIB
        assert watch.highest.peak >= after.peak >= 48 * MIB
        process.stdin.write("\n")


def test_a_watch_samples_by_itself(child):
    pid = child(f"b = bytearray(b'x') * {48 * MIB}")
    with Watch(pid) as watch:
        deadline = time.monotonic() + 10
        watch.highest = Memory(0, 0)
        while watch.highest.anon < 48 * MIB:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_process_that_is_gone_is_said_so():
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ProcessLookupError, match="has ended"):
        read_memory(process.pid)  # a zombie
    process.wait()
    with pytest.raises(ProcessLookupError, match="no process"):
        tree_memory(process.pid)


def test_sums_and_maxima():
    a, b = Memory(10, 5, 3, 2), Memory(7, 7, 1, 6, 1)
    assert a + b == Memory(17, 12, 4, 8, 1)
    assert a.highest(b) == Memory(10, 7, 3, 6, 1)
