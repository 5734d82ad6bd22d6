"""Where another device is: ``ssh://pi@raspberrypi.local:22`` or ``adb://emulator-5554``, and what is used there.

After a ``?`` may stand where things lie on the device, joined by ``&``::

    llmpack      the program llmpack, where it is not found by itself
    llama-bench  the program llama-bench, likewise
    folder       where pushed models are kept
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from llmpack.errors import UsageError
from llmpack.registry import suggestion

SCHEMES = ("ssh", "adb")
PLACES = ("llmpack", "llama-bench", "folder")
EXAMPLE = "ssh://user@host, ssh://user@host:2222 or adb://serial"


@dataclass(frozen=True)
class Address:
    """A device and how it is reached.

    host    of SSH the host's name, of adb the serial number (empty: the only device)
    user    empty for the name that SSH's configuration, or else the system, gives
    port    None for what SSH's configuration, or else the protocol, gives
    places  paths on the device, by the names of `PLACES`
    """

    scheme: Literal["ssh", "adb"]
    host: str
    user: str = ""
    port: int | None = None
    places: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        """The address without what is used there: names the device in messages."""
        user = f"{self.user}@" if self.user else ""
        port = f":{self.port}" if self.port else ""
        return f"{self.scheme}://{user}{self.host}{port}"

    def place(self, name: str) -> str:
        """A path on the device, empty where none was given."""
        return dict(self.places).get(name, "")

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read an address. Raises UsageError."""
        scheme, mark, rest = text.partition("://")
        if not mark or scheme not in SCHEMES:
            hint = suggestion(scheme, SCHEMES) if mark else ""
            raise UsageError(f"--on {text}: this is no address of a device{hint}; write {EXAMPLE}")
        body, _, query = rest.partition("?")
        places = _places(text, query)
        if scheme == "adb":
            return cls("adb", unquote(body.rstrip("/")), places=places)
        try:
            parts = urlsplit(f"ssh://{body}")
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise UsageError(f"--on {text}: {str(error).lower()}; write {EXAMPLE}") from error
        if parts.password is not None:
            raise UsageError("--on: a password does not belong into an address; use a key (`ssh-copy-id user@host`)")
        if not host or parts.path.strip("/") or parts.fragment or port == 0:
            raise UsageError(f"--on {text}: this is no address of a device; write {EXAMPLE}")
        return cls("ssh", host, unquote(parts.username or ""), port, places)


def _places(text: str, query: str) -> tuple[tuple[str, str], ...]:
    found = parse_qsl(query, keep_blank_values=True)
    for name, path in found:
        if name not in PLACES:
            hint = suggestion(name, PLACES)
            raise UsageError(f"--on {text}: unknown `{name}`{hint}; after ? may stand {', '.join(PLACES)}")
        if not path.startswith("/"):
            raise UsageError(f"--on {text}: `{name}` is a path on the device that begins with /, not {path!r}")
    return tuple(found)
