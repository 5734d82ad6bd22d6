"""A check on another device: what it is, whether it is what the budget was made for, and a measurement there.

The model is pushed and measured with the device locked. A connection that breaks while it is pushed is made again and
goes on; one that breaks while it is measured ends the check, since what was measured is gone.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from pydantic import ValidationError

from llmpack import __version__, errors
from llmpack.errors import DeviceProblem, RuntimeFailed
from llmpack.pipeline.cache import Cache
from llmpack.pipeline.evidence import Found, Subject, keep, kept
from llmpack.pipeline.on_device import Answer, Request
from llmpack.target.budget import Finding
from llmpack.target.device import Device
from llmpack.target.enforcement import CapExceededError, Exceeded
from llmpack.target.protocol import Protocol
from llmpack.target.remote.address import Address
from llmpack.target.remote.identity import identify
from llmpack.target.remote.llama_bench import bench, bench_findings
from llmpack.target.remote.station import TRIES, Station
from llmpack.target.remote.transport import Transport, connect, printable
from llmpack.units import format_size

RESERVED = 1 / 8
"""Share of a device's memory that its kernel and its graphics may keep for themselves."""
SILENCE = 180.0
"""Seconds without a word from llmpack there, which says every five that it is at work, after which it is hung."""
_NO_RUNNER = (
    "there is neither llmpack with llama-cpp-python nor a llama-bench; install one there "
    "(`pip install 'llmpack[run]'`), or say where it is (`?llama-bench=/path/llama-bench` in --on)"
)


@dataclass
class Reached:
    """A device that answers.

    device        as it was probed, named by its address
    runtime       version of llama-cpp-python of the llmpack there, None where none can be used
    load_average  processes that wanted to run there over the last minute, if known
    """

    station: Station
    device: Device
    runtime: str | None
    load_average: float | None

    def as_declared(self, profile: Device | None) -> Device:
        """The device under the name of the profile that it is declared to be; None for under its own.

        Raises DeviceProblem with everything that contradicts the profile.
        """
        if profile is None:
            return self.device
        wrong = contradictions(profile, self.device)
        if wrong:
            text = f"{self.station.name} is not a {profile.name}: {'; '.join(wrong)}"
            raise DeviceProblem(f"{text}. Name what it is with --device, or `--device host`", kind="mismatch")
        return self.device.model_copy(update={"name": profile.name})

    def measurement(self, subject: Subject, context: int, cache: Cache, cap: int | None, protocol: Protocol) -> Found:
        """Memory and speed there; kept like any other evidence. Raises DeviceProblem, RuntimeFailed, Busy."""
        program = f"llama-cpp-python {self.runtime}" if self.runtime else self.station.programs.llama_bench
        if not program:
            raise DeviceProblem(f"{self.station.name}: {_NO_RUNNER}", kind="no-runner")
        facts = {
            "name": "measurement from afar",
            "artifact": subject.sha256,
            "settings": subject.settings.model_dump(mode="json"),
            "program": program,
            "address": self.station.name,
            "device": self.device.fingerprint,
            "context": context,
            "cap": cap,
            "protocol": asdict(protocol),
        }
        found = kept(cache, facts)
        if found is None:
            found = _pushing(self.station, cache, lambda: self._measured(subject, context, cap, protocol))
            keep(cache, facts, found)
        return found

    def _measured(self, subject: Subject, context: int, cap: int | None, protocol: Protocol) -> Found:
        path = self.station.push(subject.path, subject.sha256)
        self.station.progress.say(f"measuring on {self.station.name}")
        if self.runtime is None:
            return self._benched(path, subject, context, cap, protocol)
        request = Request(
            operation="measure",
            path=path,
            artifact=subject.sha256,
            settings=subject.settings,
            context=context,
            cap=cap,
            protocol=protocol,
        )
        there = _ask(self.station, request)
        wrong = [f for f in there.findings if f.evidence.artifact != subject.sha256]
        if wrong or not there.findings or there.device.fingerprint != self.device.fingerprint:
            text = f"{self.station.name}: answered about another file or another machine than was asked about"
            raise RuntimeFailed(text, kind="protocol")
        return Found(tuple(self._from_there(f) for f in there.findings), there.report)

    def _from_there(self, finding: Finding) -> Finding:
        evidence = finding.evidence.model_copy(
            update={"device": self.device.fingerprint, "machine": self.device.description}
        )
        return finding.model_copy(update={"evidence": evidence})

    def _benched(self, path: str, subject: Subject, context: int, cap: int | None, protocol: Protocol) -> Found:
        settings = subject.settings
        threads = settings.threads or self.device.cores
        if threads is None:
            text = f"{self.station.name}: its cores are unknown; give the threads with --set runtime.threads=N"
            raise DeviceProblem(text, kind="unknown")
        try:
            found = bench(self.station, path, settings, context, threads, protocol, cap)
        except CapExceededError as ended:
            assert cap is not None
            settings = settings.model_copy(update={"threads": threads})
            exceeded = Exceeded(subject.sha256, self.device, settings, context, cap, ended.means, ended.memory)
            return Found(tuple(exceeded.findings()), exceeded.to_json())
        load = self.load_average
        findings = bench_findings(found, subject.sha256, self.device, settings, context, threads, load, cap)
        report = {"kind": "measurement", "protocol": "llama-bench", "device": self.device.model_dump(mode="json"),
                  **asdict(found)}  # fmt: skip
        return Found(tuple(findings), report)


@contextmanager
def reached(where: str, cache: Cache) -> Iterator[Reached]:
    """Connect to a device and see what it is. Raises UsageError, DeviceProblem, RuntimeFailed, MissingExtra."""
    transport = connect(Address.parse(where))
    try:
        yield _reached(transport, cache)
    finally:
        transport.close()


def _reached(transport: Transport, cache: Cache) -> Reached:
    station = Station(transport, cache.progress)
    if station.programs.llmpack:
        there = _ask(station, Request(operation="identify"))
        if there.runtime is not None or not station.programs.llama_bench:
            return Reached(station, _named(there.device, station), there.runtime, there.load_average)
    device, load = identify(transport)
    return Reached(station, device, None, load)


def probed_there(where: str, cache: Cache, *, runtime: bool) -> Device:
    """Another device as `llmpack device probe` finds it there; without llmpack there, without rates.

    Raises as `reached`, and Busy.
    """
    with reached(where, cache) as there:
        if not there.station.programs.llmpack:
            text = f"{there.station.name}: llmpack is not there, so nothing is timed; what its system tells is all"
            cache.progress.say(text)
            return there.device
        with there.station.locked(_owner(), wait=cache.wait):
            found = _ask(there.station, Request(operation="probe", runtime=runtime))
        return _named(found.device, there.station)


def contradictions(profile: Device, found: Device) -> list[str]:
    """What of a device that was found cannot be of one of that profile."""
    wrong = []
    if found.arch != profile.arch:
        wrong.append(f"it is {found.arch}, not {profile.arch}")
    if found.memory < (1 - RESERVED) * profile.memory:
        wrong.append(f"it has {format_size(found.memory)} of memory, not {format_size(profile.memory)}")
    if found.cores is not None and profile.cores is not None and found.cores < profile.cores:
        wrong.append(f"it has {found.cores} cores, not {profile.cores}")
    missing = sorted((profile.instruction_sets or frozenset()) - (found.instruction_sets or frozenset()))
    if missing and found.arch == profile.arch and found.instruction_sets is not None:
        wrong.append(f"it lacks {', '.join(missing)}")
    return wrong


def _pushing(station: Station, cache: Cache, work: Callable[[], Found]) -> Found:
    """The work with the device locked; goes on after a connection that broke while a file was sent."""
    for attempt in range(TRIES):
        sent = station.sent
        try:
            with station.locked(_owner(), wait=cache.wait):
                return work()
        except DeviceProblem as error:
            again = error.kind == "lost" and station.sent > sent and attempt + 1 < TRIES
            if not again:
                raise
            cache.progress.say(f"{error}; connecting again")
            time.sleep(min(8, 0.25 * 2**attempt))
    raise AssertionError("the last attempt returns or raises")


def _owner() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _named(device: Device, station: Station) -> Device:
    return device.model_copy(update={"name": station.name, "description": f"{device.cpu} at {station.name}"})


def _ask(station: Station, request: Request) -> Answer:
    """What llmpack on the device answers. Raises what it raised there, and RuntimeFailed for anything else."""
    command = f"{shlex.quote(station.programs.llmpack)} device answer --json"
    reply = station.measure(command, stdin=request.model_dump_json().encode(), silence=SILENCE)
    try:
        document = json.loads(reply.out)
        if isinstance(document, dict) and isinstance(document.get("error"), dict):
            _raise(station, document["error"])
        return Answer.model_validate_json(json.dumps(_shown(document)))
    except (ValueError, ValidationError, RecursionError) as error:
        shown = reply.text.strip()[:80]
        text = f"{station.name}: {station.programs.llmpack} answered what llmpack {__version__} does not understand"
        hint = f"({shown!r}; {reply.last_words}); is it the same version?"
        raise RuntimeFailed(f"{text} {hint}", kind="protocol") from error


def _shown(value: Any) -> Any:
    """JSON values whose texts may be shown."""
    if isinstance(value, dict):
        return {printable(key.encode()): _shown(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_shown(inner) for inner in value]
    return printable(value.encode()) if isinstance(value, str) else value


def _raise(station: Station, error: dict[str, Any]) -> NoReturn:
    """The error that llmpack raised on the device, if it is one that can be believed."""
    message = f"{station.name}: {printable(str(error.get('message', ''))[:2000].encode())}"
    for plain in (errors.EnvironmentProblem, errors.Busy, errors.StepFailed, errors.UsageError):
        if error.get("kind") == plain.__name__:
            raise plain(message)
    raise RuntimeFailed(message, kind="refused")
