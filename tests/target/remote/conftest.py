"""A device behind a real SSH server on the loopback."""

from __future__ import annotations

import asyncssh
import pytest
from loopback import loopback, trust

from llmpack.target.remote.address import Address
from llmpack.target.remote.ssh import SshTransport


@pytest.fixture(scope="session")
def host_key():
    return asyncssh.generate_private_key("ssh-ed25519")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The home of the one who checks: empty, so that no configuration of this machine counts."""
    path = tmp_path / "home"
    path.mkdir()
    monkeypatch.setenv("HOME", str(path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return path


@pytest.fixture
def device(tmp_path, home, host_key):
    folder = tmp_path / "device"
    folder.mkdir()
    with loopback(folder, host_key) as found:
        trust(home, found.port, host_key)
        yield found


@pytest.fixture
def shell(device):
    transport = SshTransport(Address.parse(device.address))
    yield transport
    transport.close()
