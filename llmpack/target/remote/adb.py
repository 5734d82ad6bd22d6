"""Android's debug bridge: a shell through the program ``adb``, whose server knows the phones.

Tested against a program that speaks adb's command line and runs what it is given; never on a phone.
Source: the manual of adb, ``shell`` of protocol 2 (``-T``: no terminal; exit status and streams as they are).
"""

from __future__ import annotations

import os
import queue
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

from llmpack.errors import DeviceProblem
from llmpack.target.remote.address import Address
from llmpack.target.remote.transport import (
    KEPT_ERRORS,
    LONGEST_ANSWER,
    PATIENCE,
    Reply,
    endless,
    hung,
    lost,
    printable,
)

STATE_SECONDS = 20.0
_PIECE = 1 << 16
_GOODBYE_SECONDS = 5.0
_CURES = {
    "unauthorized": "unlock the phone and allow debugging from this computer",
    "offline": "unplug it and plug it in again",
    "more than one": "name one: adb://SERIAL (`adb devices` lists them)",
}


class AdbTransport:
    """A shell on an Android device. Usable from one thread at a time."""

    def __init__(self, address: Address) -> None:
        """Raises DeviceProblem where there is no program adb."""
        self._address = address
        program = shutil.which("adb")
        if program is None:
            text = f"{address.text}: there is no program adb here; install Android's platform tools"
            raise DeviceProblem(text, kind="no-runner")
        self._adb = [program, *(("-s", address.host) if address.host else ())]
        self._known = False

    @property
    def address(self) -> Address:
        """The device."""
        return self._address

    def run(self, script: str, *, stdin: Iterable[bytes] = (), silence: float = PATIENCE) -> Reply:
        """As `Transport.run`."""
        process = self._shell(script)
        talk = _Talk(process, stdin)
        try:
            while not talk.ended(min(silence, 1.0)):
                if talk.silent > silence:
                    raise hung(self._address, silence)
                if len(talk.out) > LONGEST_ANSWER:
                    raise endless(self._address)
        finally:
            talk.end()
        if len(talk.out) > LONGEST_ANSWER:
            raise endless(self._address)
        if process.returncode and not self._present():
            raise lost(self._address, printable(bytes(talk.err)).strip()[-200:] or "adb lost the device")
        return Reply(process.returncode, bytes(talk.out), bytes(talk.err))

    @contextmanager
    def hold(self, script: str, *, silence: float = PATIENCE) -> Iterator[str]:
        """As `Transport.hold`."""
        process = self._shell(script)
        talk = _Talk(process, None)
        try:
            deadline = time.monotonic() + silence
            while b"\n" not in talk.out and not talk.ended(0.02):
                if time.monotonic() > deadline:
                    raise hung(self._address, silence)
            yield printable(bytes(talk.out).partition(b"\n")[0]).strip()
        finally:
            talk.end()

    def close(self) -> None:
        """As `Transport.close`; adb's server keeps the connection."""

    def _shell(self, script: str) -> subprocess.Popen[bytes]:
        if not self._known:
            self._require()
        command = [*self._adb, "shell", "-T", f"exec sh -c {shlex.quote(script)}"]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)

    def _state(self) -> tuple[str, str]:
        """What adb says of the device, and why it says no more."""
        try:
            found = subprocess.run([*self._adb, "get-state"], capture_output=True, timeout=STATE_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return "", f"no answer of adb for {STATE_SECONDS:g} s"
        return printable(found.stdout).strip(), printable(found.stderr).strip()

    def _present(self) -> bool:
        return self._state()[0] == "device"

    def _require(self) -> None:
        state, reason = self._state()
        if state != "device":
            words = reason or state or "adb does not see it"
            cure = next((cure for word, cure in _CURES.items() if word in words), "`adb devices` lists what adb sees")
            raise DeviceProblem(f"{self._address.text}: out of reach ({words}); {cure}", kind="unreachable")
        self._known = True


class _Talk:
    """What goes to a process and comes from it, each stream in a thread of its own."""

    def __init__(self, process: subprocess.Popen[bytes], stdin: Iterable[bytes] | None) -> None:
        """`stdin` None leaves its input open."""
        self._process = process
        self._heard = time.monotonic()
        self._failed: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        self.out, self.err = bytearray(), bytearray()
        assert process.stdout is not None
        assert process.stderr is not None
        self._threads = [
            threading.Thread(target=self._read, args=(process.stdout, self.out, 2 * LONGEST_ANSWER), daemon=True),
            threading.Thread(target=self._read, args=(process.stderr, self.err, KEPT_ERRORS), daemon=True),
        ]
        if stdin is not None:
            self._threads.append(threading.Thread(target=self._send, args=(stdin,), daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def silent(self) -> float:
        """Seconds without a byte to it or from it."""
        return time.monotonic() - self._heard

    def ended(self, seconds: float) -> bool:
        """Whether it has ended and all is read; waits so long for that. Raises what reading its input raised."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        if not self._failed.empty():
            raise self._failed.get()
        if self._process.returncode is None:
            return False
        for thread in self._threads:
            thread.join()
        return True

    def end(self) -> None:
        """Close its input, which ends what waits for it; then end the process."""
        with suppress(BrokenPipeError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(_GOODBYE_SECONDS if self.silent < _GOODBYE_SECONDS else 0)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for thread in self._threads:
            thread.join()
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()

    def _read(self, stream: IO[bytes], kept: bytearray, most: int) -> None:
        while piece := os.read(stream.fileno(), _PIECE):
            self._heard = time.monotonic()
            kept += piece
            del kept[:-most]

    def _send(self, stdin: Iterable[bytes]) -> None:
        assert self._process.stdin is not None
        try:
            with suppress(BrokenPipeError):  # it stopped reading; its status and its words tell why
                for piece in stdin:
                    self._process.stdin.write(piece)
                    self._process.stdin.flush()
                    self._heard = time.monotonic()
                self._process.stdin.close()
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            self._failed.put(error)
