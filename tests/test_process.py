"""Children: every way to end has its name, and none outlives its parent."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llmpack.errors import RuntimeFailed
from llmpack.process import TAIL_LINES, Child, Limits, child_environment

WORKER = """
import ctypes, json, os, signal, sys, time
from llmpack.runtime.conversation import RefusedError, serve

def echo(arguments, tell):
    return dict(arguments)
def count(arguments, tell):
    for number in range(arguments["to"]):
        tell({"number": number})
    return {"counted": arguments["to"]}
def signalled(arguments, tell):
    for line in range(30):
        print("line", line, file=sys.stderr)
    os.kill(os.getpid(), arguments["signal"])
def refuse(arguments, tell):
    raise RefusedError("not this file")
def fail(arguments, tell):
    raise ZeroDivisionError("of all things")
def sleep(arguments, tell):
    time.sleep(60)
def burn(arguments, tell):
    while True: pass
def allocate(arguments, tell):
    return {"length": len(bytearray(arguments["bytes"]))}
def native_allocate(arguments, tell):
    print("terminate called after throwing an instance of 'std::bad_alloc'", file=sys.stderr, flush=True)
    os.abort()
def garble(arguments, tell):
    os.write(answers, b"not json\\n")
    time.sleep(60)
def leave(arguments, tell):
    os._exit(0)
def environment(arguments, tell):
    return dict(os.environ)
def noise(arguments, tell):
    os.write(1, b'{"result": {"forged": true}}\\n')
    return {"honest": True}
def grandchild(arguments, tell):
    import subprocess
    return {"pid": subprocess.Popen(["sleep", "60"]).pid}
answers = os.dup(1)
serve({name: value for name, value in list(globals().items()) if callable(value)})
"""


@pytest.fixture
def worker(tmp_path):
    (tmp_path / "acting_worker.py").write_text(WORKER)
    package = child_environment()["PYTHONPATH"]
    children = []

    def start(**options):
        environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{package}"}
        children.append(Child("acting_worker", title="actor", environment=environment, **options))
        return children[-1]

    yield start
    for child in children:
        child.close()


def test_answers_events_and_results(worker):
    child = worker()
    assert child.ask("echo", {"text": "grüße", "n": [1, 2]}, 20) == {"text": "grüße", "n": [1, 2]}
    conversation = child.stream("count", {"to": 3}, 20)
    assert [next(conversation)["number"] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(StopIteration) as end:
        next(conversation)
    assert end.value.value == {"counted": 3}
    assert child.ask("noise", {}, 20) == {"honest": True}


def test_a_refusal_leaves_the_child_alive(worker):
    child = worker()
    with pytest.raises(RuntimeFailed, match="actor: not this file") as refusal:
        child.ask("refuse", {}, 20)
    assert refusal.value.kind == "refused"
    assert child.ask("echo", {"still": "here"}, 20) == {"still": "here"}


@pytest.mark.parametrize(
    ("operation", "arguments", "kind", "words"),
    [
        ("signalled", {"signal": int(signal.SIGABRT)}, "abort", "SIGABRT"),
        ("signalled", {"signal": int(signal.SIGSEGV)}, "crash", "SIGSEGV"),
        ("signalled", {"signal": int(signal.SIGBUS)}, "crash", "SIGBUS"),
        ("signalled", {"signal": int(signal.SIGKILL)}, "killed", "killed during `signalled`"),
        ("fail", {}, "crash", "ZeroDivisionError: of all things"),
        ("native_allocate", {}, "oom", "memory ran out"),
        ("garble", {}, "protocol", "no JSON message"),
        ("leave", {}, "protocol", "ended without an answer"),
    ],
)
def test_every_ending_has_its_name(worker, operation, arguments, kind, words):
    child = worker()
    with pytest.raises(RuntimeFailed, match=words) as ending:
        child.ask(operation, arguments, 20)
    assert ending.value.kind == kind
    assert not psutil.pid_exists(child.pid)
    with pytest.raises(RuntimeFailed, match="before `echo`"):
        child.ask("echo", {}, 20)


def test_the_last_lines_are_kept_and_no_more(worker):
    child = worker()
    with pytest.raises(RuntimeFailed, match=r"\| line 29"):
        child.ask("signalled", {"signal": int(signal.SIGABRT)}, 20)
    assert child.last_lines == tuple(f"line {n}" for n in range(30 - TAIL_LINES, 30))


def test_silence_is_a_hang(worker):
    child = worker()
    child.ask("echo", {}, 20)
    with pytest.raises(RuntimeFailed, match=r"no answer to `sleep` for 0\.2 s") as hang:
        child.ask("sleep", {}, 0.2)
    assert hang.value.kind == "hang"
    assert not psutil.pid_exists(child.pid)


def test_the_cap_on_processor_time(worker):
    with pytest.raises(RuntimeFailed, match="SIGXCPU") as spent:
        worker(limits=Limits(cpu_seconds=1)).ask("burn", {}, 20)
    assert spent.value.kind == "hang"


def test_the_cap_on_memory_refuses_an_allocation(worker):
    capped = worker(limits=Limits(data=256 << 20))
    with pytest.raises(RuntimeFailed) as refusal:
        capped.ask("allocate", {"bytes": 512 << 20}, 20)
    assert refusal.value.kind == "oom"
    assert capped.ask("allocate", {"bytes": 16 << 20}, 20) == {"length": 16 << 20}


def test_no_secret_reaches_a_child(worker, monkeypatch):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "MY_PASSWORD", "LD_PRELOAD_X", "LLAMA_ARG_X"):
        monkeypatch.setenv(name, "hunter2")
    seen = worker().ask("environment", {}, 20)
    assert "hunter2" not in json.dumps(seen)
    assert seen["GGML_NO_BACKTRACE"] == seen["HF_HUB_OFFLINE"] == "1"


def test_a_conversation_left_early_ends_the_child(worker):
    child = worker()
    conversation = child.stream("count", {"to": 3}, 20)
    next(conversation)
    conversation.close()
    assert not psutil.pid_exists(child.pid)


def test_closing_takes_grandchildren_along(worker):
    child = worker()
    grandchild = child.ask("grandchild", {}, 20)["pid"]
    child.close()
    wait_until_gone(grandchild)


def wait_until_gone(pid):
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {pid} lives on"
        time.sleep(0.02)


PARENT = """
import os, signal, sys, time
from llmpack.process import Child
child = Child("acting_worker", title="actor", environment={"PYTHONPATH": os.environ["PYTHONPATH"]})
child.ask("echo", {}, 20)
print(child.pid, flush=True)
child.ask("burn", {}, 60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_busy_child_ends_with_its_parent(tmp_path, number):
    (tmp_path / "acting_worker.py").write_text(WORKER)
    path = f"{tmp_path}{os.pathsep}{Path(child_environment()['PYTHONPATH'])}"
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(number)
        parent.wait(10)
    wait_until_gone(child)
