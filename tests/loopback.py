"""A device on this machine: asyncssh's own SSH server on the loopback, real TCP, real processes of a real shell.

Its home is a folder of the test. Faults are switches of the server.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import threading
import venv
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

import asyncssh
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


@cache
def light_install() -> dict[str, Path]:
    """What lies in the folder of packages after `pip install llmpack[run]`, and where it is here."""
    found = {"llmpack": ROOT / "llmpack"}
    needed, seen = [Requirement("llmpack[run]")], set()
    while needed:
        requirement = needed.pop()
        extras = requirement.extras or {""}
        if (requirement.name, *sorted(extras)) in seen:
            continue
        seen.add((requirement.name, *sorted(extras)))
        package = distribution(requirement.name)
        for path in package.files or ():
            if path.parts[0] not in ("..", "__pycache__") and path.suffix != ".pth":
                found.setdefault(path.parts[0], Path(package.locate_file(path.parts[0])))
        for line in package.requires or ():
            other = Requirement(line)
            if other.marker is None or any(other.marker.evaluate({"extra": extra}) for extra in extras):
                needed.append(other)
    return found


@dataclass
class Loopback:
    """A running server.

    home         the device's home folder
    break_after  bytes of standard input of one command after which the connection breaks, once; None for never
    received     bytes of standard input of each command that had any
    commands     every command, in order
    children     their processes
    """

    home: Path
    port: int = 0
    break_after: int | None = None
    received: list[int] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    children: list[asyncio.subprocess.Process] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"ssh://tester@127.0.0.1:{self.port}"

    @property
    def models(self) -> Path:
        return self.home / ".cache" / "llmpack" / "models"

    def environment(self) -> dict[str, str]:
        return {"HOME": str(self.home), "PATH": f"{self.home}/bin:/usr/bin:/bin", "LC_ALL": "C.UTF-8"}

    def program(self, name: str, text: str) -> Path:
        """An executable on the device's path."""
        path = self.home / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def install_llmpack(self) -> Path:
        """The light install with llama-cpp-python, in an environment of its own: without torch, transformers and the
        rest of what the tests run with."""
        environment = self.home / "environment"
        venv.create(environment, symlinks=True)
        (packages,) = environment.glob("lib/*/site-packages")
        for name, target in light_install().items():
            (packages / name).symlink_to(target)
        python = shlex.quote(str(environment / "bin" / "python"))
        return self.program("llmpack", f'#!/bin/sh\nexec {python} -P -m llmpack "$@"\n')

    async def handle(self, process: asyncssh.SSHServerProcess) -> None:
        self.commands.append(process.command)
        child = await asyncio.create_subprocess_shell(
            process.command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.environment(),
            cwd=self.home,
            start_new_session=True,
        )
        self.children.append(child)
        self.received.append(0)
        index = len(self.received) - 1

        async def feed() -> None:
            try:
                while piece := await process.stdin.read(1 << 15):
                    if self.break_after is not None and self.received[index] + len(piece) > self.break_after:
                        self.break_after = None
                        process.channel.get_connection().abort()
                        break
                    self.received[index] += len(piece)
                    child.stdin.write(piece)
                    await child.stdin.drain()
            except (OSError, asyncssh.Error):
                pass
            child.stdin.close()

        async def drain(source: asyncio.StreamReader, target: asyncssh.SSHWriter) -> None:
            while piece := await source.read(1 << 15):
                try:
                    target.write(piece)
                    await target.drain()
                except (OSError, asyncssh.Error):
                    child._transport.get_pipe_transport(1).close()
                    child._transport.get_pipe_transport(2).close()
                    return

        feeding = asyncio.ensure_future(feed())
        try:
            await asyncio.gather(drain(child.stdout, process.stdout), drain(child.stderr, process.stderr))
            code = await child.wait()
            process.exit(code) if code >= 0 else process.exit_with_signal("KILL")
        finally:
            feeding.cancel()
            if child.returncode is None:
                os.killpg(child.pid, signal.SIGKILL)
            child._transport.close()  # or a wait for its end waits for that of a full pipe, which nobody reads on


class _Server(asyncssh.SSHServer):
    def begin_auth(self, username: str) -> bool:
        return username != "tester"  # the others would have to show a key, and none is let in


@contextmanager
def loopback(home: Path, host_key: asyncssh.SSHKey):
    """Serve until the block ends."""
    found = Loopback(home)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> asyncssh.SSHAcceptor:
        return await asyncssh.create_server(
            _Server, "127.0.0.1", 0, server_host_keys=[host_key], process_factory=found.handle, encoding=None
        )

    async def stop(server: asyncssh.SSHAcceptor) -> None:
        server.close()
        await server.wait_closed()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for child in found.children:  # here, where no connection that goes down cancels the wait
            await child.wait()

    server = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    found.port = server.get_port()
    try:
        yield found
    finally:
        asyncio.run_coroutine_threadsafe(stop(server), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def trust(home: Path, port: int, key: asyncssh.SSHKey) -> None:
    """Write a host key into known_hosts of the user whose home that is."""
    folder = home / ".ssh"
    folder.mkdir(exist_ok=True)
    public = key.export_public_key().decode().split()
    with (folder / "known_hosts").open("a") as file:
        file.write(f"[127.0.0.1]:{port} {public[0]} {public[1]}\n")


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
    """A device whose host key is known."""
    folder = tmp_path / "device"
    folder.mkdir()
    with loopback(folder, host_key) as found:
        trust(home, found.port, host_key)
        yield found
