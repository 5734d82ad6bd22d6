"""The transport over adb, spoken to as adb is spoken to: a program that knows its command line and runs a real shell.

No phone was at hand; what a phone's own adb and shell do is not tested here.
"""

import os
import signal

import pytest

from llmpack.errors import DeviceProblem, RuntimeFailed
from llmpack.target.remote.adb import AdbTransport
from llmpack.target.remote.address import Address
from llmpack.target.remote.station import Station

ADB = """#!/bin/sh
[ "$1" = -s ] && { serial=$2; shift 2; }
state=$(cat "$PHONE/state")
case "$1" in
  get-state) [ "$state" = device ] && { echo device; exit 0; }; echo "error: $state" >&2; exit 1;;
  shell) [ "$2" = -T ] || exit 99; shift 2
    echo "$*" >> "$PHONE/commands"; cd "$PHONE" || exit 1
    exec env HOME="$PHONE" sh -c "$*";;
esac
exit 98
"""


@pytest.fixture
def phone(tmp_path, monkeypatch):
    folder = tmp_path / "phone"
    (folder / "bin").mkdir(parents=True)
    (folder / "state").write_text("device")
    program = folder / "bin" / "adb"
    program.write_text(ADB)
    program.chmod(0o755)
    monkeypatch.setenv("PHONE", str(folder))
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    return folder


def shell(folder):
    return AdbTransport(Address.parse(f"adb://emulator-5554?folder={folder}/models"))


def test_a_script_runs_with_its_streams_and_status_as_they_are(phone):
    data = bytes(range(256)) * 500
    reply = shell(phone).run('cat; echo "it\'s here" >&2; exit 3', stdin=(data[:1000], data[1000:]))
    assert (reply.code, reply.out, reply.err) == (3, data, b"it's here\n")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("device unauthorized", "unlock the phone"),
        ("device offline", "unplug"),
        ("more than one device", "adb://SERIAL"),
    ],
)
def test_a_phone_that_is_out_of_reach_is_told_of(phone, state, words):
    (phone / "state").write_text(state)
    with pytest.raises(DeviceProblem, match=words) as found:
        shell(phone).run("true")
    assert found.value.kind == "unreachable"


def test_no_adb_is_told_of(phone, monkeypatch):
    monkeypatch.setenv("PATH", str(phone))
    with pytest.raises(DeviceProblem, match="platform tools"):
        shell(phone)


def test_a_phone_that_goes_away_is_told_of(phone):
    transport = shell(phone)
    assert transport.run("true").code == 0
    with pytest.raises(DeviceProblem) as found:
        transport.run(f"echo offline > {phone}/state; exit 1")
    assert found.value.kind == "lost"


def test_a_command_that_hangs_is_ended(phone):
    with pytest.raises(RuntimeFailed) as found:
        shell(phone).run("echo $$ > pid; sleep 60", silence=0.5)
    assert found.value.kind == "hang"
    with pytest.raises(ProcessLookupError):
        os.kill(int((phone / "pid").read_text()), signal.SIGCONT)


def test_an_answer_without_end_is_refused(phone, monkeypatch):
    monkeypatch.setattr("llmpack.target.remote.adb.LONGEST_ANSWER", 1 << 16)
    with pytest.raises(RuntimeFailed, match="more than") as found:
        shell(phone).run("yes")
    assert found.value.kind == "protocol"


def test_a_model_is_pushed_under_a_lock(phone, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(os.urandom(300_000))
    from llmpack.digest import sha256_file

    station = Station(shell(phone))
    with station.locked("a check"):
        (phone / "models" / f"{sha256_file(path)}.gguf.part").write_bytes(path.read_bytes()[:100_000])
        there = station.push(path, sha256_file(path))
        other = shell(phone)
        with other.hold(
            f"cd {phone}/models; ( flock -n 9 || {{ echo taken; exit 1; }}; echo free; cat ) 9>> lock"
        ) as line:
            assert line == "taken"
    assert there == f"{phone}/models/{sha256_file(path)}.gguf"
    assert (phone / "models" / f"{sha256_file(path)}.gguf").read_bytes() == path.read_bytes()
    assert station.sent == 200_000
