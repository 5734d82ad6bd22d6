"""The transport against OpenSSH's own server, where there is one, with keys of its own and in a folder of the test."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from hashlib import sha256

import asyncssh
import pytest

from llmpack.errors import DeviceProblem
from llmpack.target.remote.address import Address
from llmpack.target.remote.ssh import SshTransport
from llmpack.target.remote.station import Station

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
pytestmark = pytest.mark.skipif(SSHD is None, reason="OpenSSH's server is not installed")


@pytest.fixture
def server(tmp_path, home, host_key):
    """Its port; the key of `home` is let in, its host key is known there."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    (home / ".ssh").mkdir(mode=0o700)
    key.write_private_key(home / ".ssh" / "id_ed25519")
    (home / ".ssh" / "id_ed25519").chmod(0o600)
    key.write_public_key(tmp_path / "authorized")
    host_key.write_private_key(tmp_path / "host")
    (tmp_path / "host").chmod(0o600)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lines = ["ListenAddress 127.0.0.1", f"Port {port}", f"HostKey {tmp_path}/host", f"PidFile {tmp_path}/pid"]
    lines += [f"AuthorizedKeysFile {tmp_path}/authorized", "UsePAM no", "StrictModes no", "PasswordAuthentication no"]
    (tmp_path / "config").write_text("\n".join(lines) + "\n")
    process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(tmp_path / "config")], stderr=subprocess.PIPE)
    try:
        for _ in range(200):
            if process.poll() is not None:
                pytest.skip(f"sshd does not start here: {process.stderr.read().decode().strip()[-200:]}")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait()
        process.stderr.close()


def test_a_model_is_pushed_and_continued_under_a_lock(server, home, host_key, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(os.urandom(400_000))
    digest = sha256(path.read_bytes()).hexdigest()
    folder = tmp_path / "models"
    address = Address.parse(f"ssh://{getpass.getuser()}@127.0.0.1:{server}?folder={folder}")
    shell = SshTransport(address)
    with pytest.raises(DeviceProblem) as refusal:
        shell.run("true")
    assert refusal.value.kind == "host-key"
    public = host_key.export_public_key().decode().split()
    (home / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{server} {public[0]} {public[1]}\n")
    station = Station(shell)
    (folder / f"{digest}.gguf.part").write_bytes(path.read_bytes()[:150_000])
    with station.locked("a check"):
        assert station.push(path, digest) == f"{folder}/{digest}.gguf"
    assert station.sent == 250_000
    assert (folder / f"{digest}.gguf").read_bytes() == path.read_bytes()
    assert shell.run("cat; exit 3", stdin=(b"\x00\xff",)).out == b"\x00\xff"
    shell.close()
