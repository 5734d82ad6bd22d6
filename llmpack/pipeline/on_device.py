"""The device's half of a check from afar: ``llmpack device answer`` reads one request, answers once, in JSON.

While it works it says so on standard error every few seconds, so that silence means a hang; if nobody reads that any
more, it ends itself, so that a broken connection leaves nothing running that would disturb the next check.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from llmpack import __version__
from llmpack.errors import UsageError
from llmpack.pipeline.cache import Cache
from llmpack.pipeline.keys import installed
from llmpack.runtime.settings import RuntimeSettings
from llmpack.target.budget import Finding
from llmpack.target.device import Device
from llmpack.target.probe import load_average, probe_host, with_runtime
from llmpack.target.protocol import Protocol

FORMAT: Literal[1] = 1
HEARTBEAT_SECONDS = 5.0


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1] = FORMAT


class Request(_Message):
    """What is asked.

    operation  "identify" (what this machine is), "probe" (its rates too) or "measure"
    runtime    of "probe": time the kernels of llama.cpp too
    path       of "measure": the model file on this machine, whose sha256 is `artifact`
    cap        bytes of memory that the measured process is held to
    """

    operation: Literal["identify", "probe", "measure"]
    runtime: bool = False
    path: str = ""
    artifact: str = ""
    settings: RuntimeSettings = RuntimeSettings()
    context: int = 16
    cap: int | None = None
    protocol: Protocol = Protocol()


class Answer(_Message):
    """What came out.

    llmpack       version of llmpack that answered
    runtime       version of llama-cpp-python there, None without it
    device        the machine, as probed
    load_average  processes that wanted to run over the last minute before, if the system tells
    findings      of "measure": the figures with their evidence, and the full report
    """

    llmpack: str
    runtime: str | None
    device: Device
    load_average: float | None
    findings: tuple[Finding, ...] = ()
    report: dict[str, Any] = {}


def answer(text: str, cache: Cache) -> Answer:
    """Do what a request asks. Raises UsageError for something else, and what measuring raises."""
    try:
        request = Request.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(f"this is no request that llmpack {__version__} knows: {place} {first['msg']}") from error
    load = load_average()
    with _heartbeat():
        return _done(request, load, cache)


def serve(cache: Cache) -> None:
    """Answer the request on standard input. Raises as `answer`."""
    print(answer(sys.stdin.read(), cache).model_dump_json())


def _done(request: Request, load: float | None, cache: Cache) -> Answer:
    device = probe_host(rates=request.operation == "probe")
    if request.operation == "probe" and request.runtime:
        device = with_runtime(device, cache.progress)
    found = Answer(llmpack=__version__, runtime=installed("llama-cpp-python"), device=device, load_average=load)
    if request.operation != "measure":
        return found
    from llmpack.target.measure import measure

    with cache.lock("measuring", "measuring on this machine"):  # somebody may be at work on the device itself
        seen = measure(
            Path(request.path),
            request.settings,
            request.context,
            artifact=request.artifact,
            cap=request.cap,
            protocol=request.protocol,
            progress=cache.progress,
        )
    return found.model_copy(update={"findings": tuple(seen.findings()), "report": seen.to_json()})


@contextmanager
def _heartbeat() -> Iterator[None]:
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_SECONDS):
            try:
                print("llmpack: at work", file=sys.stderr, flush=True)
            except OSError:  # nobody listens any more
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
