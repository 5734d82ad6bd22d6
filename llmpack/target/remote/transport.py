"""Transport: a shell on another device, and nothing more.

All that a check does there it says in POSIX sh, so another way to reach a device is one class with three methods.
What comes back is not trusted: its size is capped, and control characters are taken out before it is shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from llmpack.errors import DeviceProblem, RuntimeFailed
from llmpack.target.remote.address import Address

LONGEST_ANSWER = 16 << 20
"""Bytes of standard output beyond which an answer is refused."""
KEPT_ERRORS = 1 << 14
"""Bytes of standard error that are kept, from its end."""
PATIENCE = 60.0
"""Seconds of silence after which a command counts as hung."""
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Reply:
    """What a command left: exit status (128 and more for a signal), standard output, the end of standard error."""

    code: int
    out: bytes
    err: bytes

    @property
    def text(self) -> str:
        """Standard output without control characters."""
        return printable(self.out)

    @property
    def last_words(self) -> str:
        """The last lines of standard error, as they may be shown."""
        lines = [line.strip() for line in printable(self.err).splitlines() if line.strip()]
        return "; ".join(lines[-3:])[-500:] or f"exit status {self.code}"


class Transport(Protocol):
    """A shell on another device."""

    @property
    def address(self) -> Address:
        """The device."""

    def run(self, script: str, *, stdin: Iterable[bytes] = (), silence: float = PATIENCE) -> Reply:
        """Run a script of sh to its end.

        stdin    what it reads, in pieces
        silence  seconds without a byte from it, or to it, after which it counts as hung

        Raises DeviceProblem (unreachable, host-key, login, lost), RuntimeFailed ("hang", and "protocol" for an
        answer that does not end).
        """

    def hold(self, script: str, *, silence: float = PATIENCE) -> AbstractContextManager[str]:
        """Start a script that goes on until its standard input closes; gives its first line, empty if there is none.

        However the connection ends, the device closes that input. Raises as `run` does.
        """

    def close(self) -> None:
        """End the connection. The next command makes another."""


def printable(data: bytes) -> str:
    """Text of a device, without what could steer a terminal."""
    return _CONTROL.sub("", data.decode("utf-8", "replace"))


def hung(address: Address, seconds: float) -> RuntimeFailed:
    """The error of a device that does not answer."""
    return RuntimeFailed(f"{address.text}: no answer for {seconds:g} s; the command there was ended", kind="hang")


def endless(address: Address) -> RuntimeFailed:
    """The error of an answer that does not end."""
    return RuntimeFailed(f"{address.text}: answered with more than {LONGEST_ANSWER >> 20} MiB", kind="protocol")


def lost(address: Address, reason: object) -> DeviceProblem:
    """The error of a connection that broke."""
    text = f"{address.text}: the connection was lost ({reason}); the same command goes on where it was"
    return DeviceProblem(text, kind="lost")


def connect(address: Address) -> Transport:
    """The transport of an address; nothing is connected yet. Raises MissingExtra where asyncssh is not installed."""
    if address.scheme == "adb":
        from llmpack.target.remote.adb import AdbTransport

        return AdbTransport(address)
    from llmpack.target.remote.ssh import SshTransport

    return SshTransport(address)
