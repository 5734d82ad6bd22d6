"""SSH, by asyncssh: host keys are always checked, and nothing that is asked on a terminal.

Keys, agents, jump hosts and aliases are those of ``~/.ssh/config``. A host whose key is not in ``known_hosts``, or is
another one than stands there, is refused, and the message says what to do.
"""

from __future__ import annotations

import asyncio
import shlex
import threading
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from llmpack.errors import DeviceProblem
from llmpack.lazy import LazyModule
from llmpack.target.remote.address import Address
from llmpack.target.remote.transport import KEPT_ERRORS, LONGEST_ANSWER, PATIENCE, Reply, endless, hung, lost

asyncssh: Any = LazyModule("asyncssh", "ssh")

CONNECT_SECONDS = 30.0
KEEPALIVE_SECONDS, KEEPALIVE_COUNT = 10, 3
_PIECE = 1 << 16
T = TypeVar("T")


class SshTransport:
    """A shell on a device that runs an SSH server. Usable from one thread at a time."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._connection: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> Address:
        """The device."""
        return self._address

    def run(self, script: str, *, stdin: Iterable[bytes] = (), silence: float = PATIENCE) -> Reply:
        """As `Transport.run`."""
        return self._wait(self._run(script, stdin, silence))

    @contextmanager
    def hold(self, script: str, *, silence: float = PATIENCE) -> Iterator[str]:
        """As `Transport.hold`."""
        process, line = self._wait(self._held(script, silence))
        try:
            yield line
        finally:
            with suppress(DeviceProblem):  # a connection that is gone has let go of it too
                self._wait(self._let_go(process))

    def close(self) -> None:
        """As `Transport.close`."""
        if self._loop is None or self._thread is None:
            return
        if self._connection is not None:
            self._wait(self._disconnect())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._loop = self._thread = None

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of work in the loop's own thread; an interrupt of the user ends the work too."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="ssh", daemon=True)
            self._thread.start()
        future = asyncio.run_coroutine_threadsafe(self._told(work), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _told(self, work: Coroutine[Any, Any, T]) -> T:
        """The work, with what asyncssh raises in the words of llmpack."""
        try:
            return await work
        except asyncssh.HostKeyNotVerifiable as error:
            raise _untrusted(self._address, str(error)) from error
        except asyncssh.PermissionDenied as error:
            raise _refused(self._address) from error
        except (asyncssh.ConnectionLost, asyncssh.DisconnectError, asyncssh.ChannelOpenError) as error:
            if self._connection is None:
                raise _unreachable(self._address, error) from error
            self._forget()
            raise lost(self._address, error) from error
        except (OSError, EOFError) as error:
            if self._connection is None:
                raise _unreachable(self._address, error) from error
            self._forget()
            raise lost(self._address, str(error) or type(error).__name__) from error

    def _forget(self) -> None:
        self._connection.abort()
        self._connection = None

    async def _connected(self) -> Any:
        if self._connection is None or self._connection.is_closed():
            self._connection = None
            named = {"username": self._address.user or None, "port": self._address.port}
            options = {name: value for name, value in named.items() if value is not None}
            self._connection = await asyncio.wait_for(
                asyncssh.connect(
                    self._address.host,
                    keepalive_interval=KEEPALIVE_SECONDS,
                    keepalive_count_max=KEEPALIVE_COUNT,
                    **options,
                ),
                CONNECT_SECONDS,
            )
        return self._connection

    async def _disconnect(self) -> None:
        self._connection.close()
        await self._connection.wait_closed()
        self._connection = None

    async def _started(self, script: str) -> Any:
        connection = await self._connected()
        return await connection.create_process(f"exec sh -c {shlex.quote(script)}", encoding=None)

    async def _run(self, script: str, stdin: Iterable[bytes], silence: float) -> Reply:
        process = await self._started(script)
        talk = _Talk(process, self._address)
        try:
            await talk.whole(stdin, silence)
        finally:
            process.close()
        if process.exit_status is None:  # the channel closed without a word about how it ended
            raise asyncssh.ConnectionLost("the command ended without a status")
        code = process.exit_status if process.exit_signal is None else 128
        return Reply(code, bytes(talk.out), bytes(talk.err))

    async def _held(self, script: str, silence: float) -> tuple[Any, str]:
        process = await self._started(script)
        try:
            line = await asyncio.wait_for(process.stdout.readline(), silence)
        except TimeoutError:
            process.close()
            raise hung(self._address, silence) from None
        return process, line.decode("utf-8", "replace").strip()

    async def _let_go(self, process: Any) -> None:
        """Close its input and give it a moment to end, so that what it held is free when this returns."""
        process.stdin.write_eof()
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait_closed(), 5)
        process.close()


class _Talk:
    """What goes to a command and comes from it."""

    def __init__(self, process: Any, address: Address) -> None:
        self._process, self._address = process, address
        self._heard = asyncio.get_running_loop().time()
        self.out, self.err = bytearray(), bytearray()

    async def whole(self, stdin: Iterable[bytes], silence: float) -> None:
        """To the end of the command."""
        self._heard = asyncio.get_running_loop().time()
        work = [asyncio.ensure_future(part) for part in (self._send(stdin), self._read_out(), self._read_err())] + [
            asyncio.ensure_future(self._process.wait_closed())
        ]
        try:
            pending = set(work)
            while pending:
                left = self._heard + silence - asyncio.get_running_loop().time()
                if left <= 0:
                    self._process.kill()
                    raise hung(self._address, silence)
                done, pending = await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_EXCEPTION)
                for part in done:
                    part.result()
        finally:
            for part in work:
                part.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    def _hear(self) -> None:
        self._heard = asyncio.get_running_loop().time()

    async def _send(self, stdin: Iterable[bytes]) -> None:
        with suppress(BrokenPipeError):  # it stopped reading; its status and its words tell why
            for piece in stdin:
                self._process.stdin.write(piece)
                await self._process.stdin.drain()
                self._hear()
            self._process.stdin.write_eof()

    async def _read_out(self) -> None:
        while piece := await self._process.stdout.read(_PIECE):
            self._hear()
            self.out += piece
            if len(self.out) > LONGEST_ANSWER:
                self._process.kill()
                raise endless(self._address)

    async def _read_err(self) -> None:
        while piece := await self._process.stderr.read(_PIECE):
            self._hear()
            self.err += piece
            del self.err[:-KEPT_ERRORS]


def _command(address: Address) -> str:
    port = f"-p {address.port} " if address.port else ""
    user = f"{address.user}@" if address.user else ""
    return f"{port}{user}{address.host}"


def _untrusted(address: Address, reason: str) -> DeviceProblem:
    named = f"[{address.host}]:{address.port}" if address.port not in (None, 22) else address.host
    text = (
        f"{address.text}: its host key is not the one that known_hosts has for it, or known_hosts has none ({reason}). "
        f"Log in once with `ssh {_command(address)}` and compare the fingerprint with that of the device "
        "(`ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` there). Only if the device was set up anew: remove its "
        f"old key with `ssh-keygen -R '{named}'` first"
    )
    return DeviceProblem(text, kind="host-key")


def _refused(address: Address) -> DeviceProblem:
    text = f"{address.text}: the device refuses this user's keys; let one in with `ssh-copy-id {_command(address)}`"
    return DeviceProblem(f"{text} (keys with a passphrase need an agent: `ssh-add`)", kind="login")


def _unreachable(address: Address, error: BaseException) -> DeviceProblem:
    reason = str(error) or f"no answer for {CONNECT_SECONDS:g} s"
    return DeviceProblem(f"{address.text}: out of reach ({reason}); try `ssh {_command(address)}`", kind="unreachable")
