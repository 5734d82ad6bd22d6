import pytest

from llmpack.errors import UsageError
from llmpack.target.remote.address import Address


def test_addresses_are_read():
    found = Address.parse("ssh://pi@raspberrypi.local:2222?llama-bench=/opt/llama-bench&folder=/mnt/ssd")
    assert (found.scheme, found.user, found.host, found.port) == ("ssh", "pi", "raspberrypi.local", 2222)
    assert (found.place("llama-bench"), found.place("folder"), found.place("llmpack")) == (
        "/opt/llama-bench",
        "/mnt/ssd",
        "",
    )
    assert found.text == "ssh://pi@raspberrypi.local:2222"
    assert Address.parse("ssh://board").text == "ssh://board"
    assert Address.parse("ssh://[::1]:22").host == "::1"
    assert Address.parse("adb://192.168.1.5:5555").host == "192.168.1.5:5555"
    assert Address.parse("adb://").host == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pi@board", "ssh://user@host"),
        ("shh://board", "did you mean `ssh`"),
        ("ssh://", "no address of a device"),
        ("ssh://pi:secret@board", "a password does not belong"),
        ("ssh://board:70000", "port"),
        ("ssh://board/home", "no address of a device"),
        ("ssh://board?lama-bench=/x", "did you mean `llama-bench`"),
        ("ssh://board?folder=models", "begins with /"),
    ],
)
def test_what_is_no_address_is_refused(text, words):
    with pytest.raises(UsageError, match=words.replace("?", r"\?")) as found:
        Address.parse(text)
    assert "secret" not in str(found.value)
