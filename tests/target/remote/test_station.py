"""What a device is asked for before and after it measures: programs, lock, models by digest."""

import os
import threading
import time
from hashlib import sha256

import psutil
import pytest

from llmpack.errors import Busy, DeviceProblem, RuntimeFailed, VerificationFailed
from llmpack.target.probe import probe_host
from llmpack.target.remote.address import Address
from llmpack.target.remote.identity import identify
from llmpack.target.remote.ssh import SshTransport
from llmpack.target.remote.station import Station

PIECE = 1 << 17


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(os.urandom(5 * PIECE + 12345))
    return path, sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def station(shell):
    return Station(shell)


def test_programs_are_found_or_given(device, shell):
    assert Station(shell).programs.llmpack == ""
    device.program("llmpack", "#!/bin/sh\n")
    bench = device.program("elsewhere", "#!/bin/sh\n")
    transport = SshTransport(Address.parse(f"{device.address}?llama-bench={bench}&folder={device.home}/in%20here"))
    found = Station(transport).programs
    transport.close()
    assert found.llmpack == str(device.home / "bin" / "llmpack")
    assert found.llama_bench == str(bench)
    assert found.folder == f"{device.home}/in here"


def test_a_program_that_is_not_there_is_told_of(device):
    transport = SshTransport(Address.parse(f"{device.address}?llmpack=/nowhere/llmpack"))
    with pytest.raises(DeviceProblem, match=r"no program /nowhere/llmpack") as found:
        Station(transport)
    transport.close()
    assert found.value.kind == "no-runner"


def test_a_shell_tells_the_same_machine_as_a_probe(shell):
    found, load = identify(shell)
    assert found.fingerprint == probe_host().fingerprint
    assert load is not None


def test_a_model_is_pushed_once(device, station, model):
    path, digest = model
    there = station.push(path, digest)
    assert there == str(device.models / f"{digest}.gguf")
    assert (device.models / f"{digest}.gguf").read_bytes() == path.read_bytes()
    assert station.sent == path.stat().st_size
    station.push(path, digest)
    assert station.sent == path.stat().st_size
    assert not list(device.models.glob("*.part"))


def test_a_broken_push_goes_on_where_it_was(device, station, model):
    path, digest = model
    device.break_after = 3 * PIECE
    with pytest.raises(DeviceProblem) as found:
        station.push(path, digest)
    assert found.value.kind == "lost"
    arrived = sum(device.received)
    assert 2 * PIECE < arrived <= 3 * PIECE
    assert not (device.models / f"{digest}.gguf").exists()
    station.push(path, digest)
    assert sum(device.received) == path.stat().st_size  # nothing twice
    assert (device.models / f"{digest}.gguf").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ["{}.gguf.part", "{}.gguf"])
@pytest.mark.parametrize("size", [1000, 6 * PIECE])
def test_what_lies_there_damaged_is_sent_again(device, station, model, name, size):
    path, digest = model
    (device.models / name.format(digest)).write_bytes(b"x" * size)
    station.push(path, digest)
    assert (device.models / f"{digest}.gguf").read_bytes() == path.read_bytes()


def test_damage_on_the_way_is_not_tried_for_ever(station, model):
    with pytest.raises(VerificationFailed, match="damaged twice"):
        station.push(model[0], "0" * 64)


def test_a_full_disk_is_told_of_before_anything_is_sent(device, station, model):
    text = "#!/bin/sh\necho Filesystem 1024-blocks Used Available Capacity Mounted\necho /dev/x 100 1 66048 1% /\n"
    device.program("df", text)
    with pytest.raises(DeviceProblem, match=r"64.5 MiB are free, 652.1 KiB are to be sent") as found:
        station.push(*model)
    assert found.value.kind == "no-space"
    assert station.sent == 0


def test_a_disk_that_fills_up_is_told_of(device, station, model):
    path, digest = model
    (device.models / f"{digest}.gguf.part").symlink_to("/dev/full")
    with pytest.raises(DeviceProblem, match="No space left on device") as found:
        station.push(path, digest)
    assert found.value.kind == "no-space"


def test_only_one_check_works_on_a_device(device, station):
    other = SshTransport(Address.parse(device.address))
    second = Station(other)
    entered = threading.Event()
    order = []

    def wait():
        with second.locked("the second"):
            order.append("second")
            entered.set()

    with station.locked("the first"):
        with pytest.raises(Busy, match="is being measured by the first"), second.locked("x", wait=False):
            pass
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not entered.wait(0.5)
        order.append("first")
    waiting.join(20)
    other.close()
    assert order == ["first", "second"]


def test_python_locks_where_there_is_no_flock(device, station):
    object.__setattr__(station.programs, "tools", frozenset({"python3"}))
    other = SshTransport(Address.parse(device.address))
    with station.locked("the first"), pytest.raises(Busy), Station(other).locked("x", wait=False):
        pass
    other.close()
    object.__setattr__(station.programs, "tools", frozenset())
    with pytest.raises(DeviceProblem, match="flock or python3"), station.locked("x"):
        pass


def test_a_measurement_that_hangs_is_ended_on_the_device(device, station):
    with pytest.raises(RuntimeFailed) as found:
        station.measure("sleep 300 & echo $! > child; wait", silence=0.3)
    assert found.value.kind == "hang"
    child = int((device.models / "child").read_text())
    for _ in range(100):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    pytest.fail("what it started is still there")
