"""A device behind a real SSH server on the loopback."""

from __future__ import annotations

import pytest
from loopback import device, home, host_key  # noqa: F401 - fixtures

from llmpack.target.remote.address import Address
from llmpack.target.remote.ssh import SshTransport


@pytest.fixture
def shell(device):  # noqa: F811
    transport = SshTransport(Address.parse(device.address))
    yield transport
    transport.close()
