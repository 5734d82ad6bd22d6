"""The transport over SSH: what goes through, who is trusted, and how a device that fails is told of."""

import asyncssh
import pytest
from loopback import loopback, trust

from llmpack.errors import DeviceProblem, RuntimeFailed
from llmpack.target.remote import transport as limits
from llmpack.target.remote.address import Address
from llmpack.target.remote.ssh import SshTransport


def test_a_script_runs_with_its_streams_and_status_as_they_are(shell):
    data = bytes(range(256)) * 1000
    reply = shell.run('cat; echo "it\'s $((6 * 7))" >&2; exit 3', stdin=(data[:1000], data[1000:]))
    assert (reply.code, reply.out, reply.err) == (3, data, b"it's 42\n")
    assert reply.last_words == "it's 42"
    assert shell.run("kill -9 $$").code >= 128


def test_control_characters_are_not_shown(shell):
    reply = shell.run(r"printf '\033[2J\033]0;title\007ok\n\001'; printf '\033[31mbad' >&2; exit 1")
    assert reply.text == "[2J]0;titleok\n"
    assert reply.last_words == "[31mbad"


def test_an_input_that_nobody_reads_is_no_failure(shell):
    assert shell.run("exec <&-; echo enough", stdin=(b"x" * 65536 for _ in range(64))).text == "enough\n"


def test_an_unknown_or_another_host_key_is_refused(tmp_path, home, host_key):
    with loopback(tmp_path, host_key) as device:
        shell = SshTransport(Address.parse(device.address))
        try:
            with pytest.raises(DeviceProblem, match="compare the fingerprint") as found:
                shell.run("true")
            assert found.value.kind == "host-key"
            assert found.value.exit_code == 6
            trust(home, device.port, asyncssh.generate_private_key("ssh-ed25519"))
            with pytest.raises(DeviceProblem, match=rf"ssh-keygen -R '\[127.0.0.1\]:{device.port}'"):
                shell.run("true")
            assert device.commands == []
        finally:
            shell.close()


def test_one_who_is_not_let_in_is_told_how_to_be(device):
    shell = SshTransport(Address.parse(device.address.replace("tester", "stranger")))
    with pytest.raises(DeviceProblem, match=rf"ssh-copy-id -p {device.port} stranger@127.0.0.1") as found:
        shell.run("true")
    shell.close()
    assert found.value.kind == "login"


def test_a_device_that_is_not_there(home):
    shell = SshTransport(Address.parse("ssh://127.0.0.1:1"))
    with pytest.raises(DeviceProblem, match="out of reach") as found:
        shell.run("true")
    shell.close()
    assert found.value.kind == "unreachable"


def test_a_command_that_hangs_is_ended(shell):
    with pytest.raises(RuntimeFailed, match=r"no answer for 0.3 s") as found:
        shell.run("sleep 60", silence=0.3)
    assert found.value.kind == "hang"
    assert shell.run("echo still here").text == "still here\n"  # the connection is as good as before


def test_a_command_that_goes_on_talking_does_not_hang(shell):
    assert shell.run("for i in 1 2 3 4 5; do echo $i; sleep 0.15; done", silence=0.5).text == "1\n2\n3\n4\n5\n"


def test_an_answer_without_end_is_refused(shell, monkeypatch):
    monkeypatch.setattr("llmpack.target.remote.ssh.LONGEST_ANSWER", 1 << 16)
    with pytest.raises(RuntimeFailed, match="more than") as found:
        shell.run("yes")
    assert found.value.kind == "protocol"
    assert limits.LONGEST_ANSWER == 16 << 20


def test_a_connection_that_breaks_is_made_again(device, shell):
    device.break_after = 1 << 16
    with pytest.raises(DeviceProblem, match="connection was lost") as found:
        shell.run("cat > taken", stdin=(b"x" * 65536 for _ in range(64)))
    assert found.value.kind == "lost"
    assert shell.run("echo back").text == "back\n"


def test_what_is_held_is_let_go_of(shell):
    script = "( flock -n 9 || { echo taken; exit 1; }; echo held; cat ) 9>> lock"
    with shell.hold(script) as line:
        assert line == "held"
        with shell.hold(script) as other:
            assert other == "taken"
    with shell.hold(script) as line:
        assert line == "held"


def test_what_is_held_is_let_go_of_when_the_connection_breaks(device, shell):
    script = "( flock -n 9 || { echo taken; exit 1; }; echo held; cat ) 9>> lock"
    device.break_after = 10
    with shell.hold(script) as line:
        assert line == "held"
        with pytest.raises(DeviceProblem):
            shell.run("cat", stdin=(b"x" * 100,))
        with shell.hold(f"sleep 0.2; {script}") as again:
            assert again == "held"
