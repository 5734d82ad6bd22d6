"""Child processes with limits, spoken to in lines of JSON.

Native code meets untrusted files only in a child that is started here. A child

- leads a session of its own, so that Ctrl-C in the terminal reaches the parent alone, which ends the child;
- dies with its parent: its standard input closes, and on Linux the kernel kills it (PR_SET_PDEATHSIG, which
  follows the *thread* that started it, so that thread must outlive the child);
- writes no core file, sees no secrets (an allow-list of environment variables), and keeps off the network hub;
- may have a cap on private writable memory (RLIMIT_DATA) and on processor time. The address space is never
  capped: that would refuse to map a model that fits.

However it ends, the parent learns why as a `RuntimeFailed` whose `kind` is one of

    refused   the worker understood and said no (a damaged file, a context that does not fit)
    abort     native code gave up on an assertion (SIGABRT)
    crash     another signal (SIGSEGV, SIGBUS, ...) or an unforeseen error in the worker
    oom       memory ran out: the system's killer, an allocation that failed, or the cap
    killed    SIGKILL by someone else
    hang      no answer in time, or the cap on processor time
    protocol  it spoke no JSON, or went without an answer
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self

from llmpack.errors import RuntimeFailed

TAIL_LINES = 20
LONGEST_ANSWER = 64 << 20
_GOODBYE_SECONDS = 2.0

_KEPT_VARIABLES = frozenset(
    {"PATH", "HOME", "LANG", "LANGUAGE", "TMPDIR", "TZ", "TERM", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"}
)
_SET_VARIABLES = {
    "GGML_NO_BACKTRACE": "1",  # else the abort handler of ggml starts a debugger, which can hang
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONNOUSERSITE": "1",
}
# What libraries write before they give up for want of memory; the way in which they end does not tell.
_MEMORY_WORDS = (
    "std::bad_alloc",
    "MemoryError",
    "failed to allocate",
    "unable to allocate",
    "insufficient memory",
    "out of memory",
    "Cannot allocate memory",
    "can't start new thread",
)


@dataclass(frozen=True)
class Limits:
    """What a child may take.

    data         bytes of private writable memory (RLIMIT_DATA); mapped files do not count. None: no cap
    cpu_seconds  processor time of all threads together; None: no cap
    cpus         numbers of the processors that it may run on; empty: all that the parent may (Linux)
    """

    data: int | None = None
    cpu_seconds: int | None = None
    cpus: tuple[int, ...] = ()


NO_LIMITS = Limits()


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that a child sees: a short allow-list, so that no token or key gets through.

    Variables that steer runtimes (OMP_*, GGML_*, LLAMA_*) are left out too: settings belong in the
    recipe, where they are recorded.
    """
    kept = {k: v for k, v in os.environ.items() if k in _KEPT_VARIABLES or k.startswith("LC_")}
    package_home = str(Path(__file__).resolve().parent.parent)
    return {**kept, **_SET_VARIABLES, "PYTHONPATH": package_home, **(extra or {})}


def oom_kills() -> int:
    """How many processes the kernel's out-of-memory killer has ended since boot; 0 where it does not tell."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


class Child:
    """A child process that answers requests, one JSON document a line.

    A request is ``{"operation": name, "arguments": {...}}``; the worker (see `runtime.conversation`)
    sends any number of ``{"event": {...}}``, then ``{"result": {...}}`` or
    ``{"error": {"kind": ..., "message": ...}}``. A child whose answer was late, broken off or no
    JSON is ended: it is never asked twice. Usable from one thread at a time.
    """

    def __init__(
        self,
        module: str,
        *,
        title: str,
        limits: Limits = NO_LIMITS,
        environment: Mapping[str, str] | None = None,
        hint: Callable[[], str] = str,
    ) -> None:
        """Start ``python -m module``; `title` names the child in messages, `hint` what to try where it crashed."""
        self.title, self._hint = title, hint
        self._kills_before = oom_kills()
        command = [sys.executable, "-P", "-m", "llmpack.process", json.dumps(asdict(limits)), str(os.getpid()), module]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=child_environment(environment),
        )
        self._end = weakref.finalize(self, _end_process, self._process)
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._errors: deque[str] = deque(maxlen=TAIL_LINES)
        self._readers = [
            threading.Thread(target=_read_answers, args=(self._process.stdout, self._answers), daemon=True),
            threading.Thread(target=_read_errors, args=(self._process.stderr, self._errors), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        """Its process id, which is also its session and group."""
        return self._process.pid

    @property
    def last_lines(self) -> tuple[str, ...]:
        """The last lines that it wrote to standard error."""
        return tuple(self._errors)

    def ask(self, operation: str, arguments: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """The result of one request. Raises RuntimeFailed (see the module for its kinds).

        timeout  seconds of silence after which the child counts as hung
        """
        conversation = self.stream(operation, arguments, timeout)
        while True:
            try:
                next(conversation)
            except StopIteration as finished:
                return dict(finished.value)

    def stream(
        self, operation: str, arguments: Mapping[str, Any], timeout: float
    ) -> Generator[dict[str, Any], None, dict[str, Any]]:
        """Yields the events of one request and returns its result; raises as `ask` does.

        Left before its end, it ends the child, whose remaining answers would be taken for later ones.
        """
        whole = False
        try:
            self._send(operation, arguments)
            while True:
                message = self._receive(operation, timeout)
                if "event" in message:
                    yield dict(message["event"])
                    continue
                whole = True
                if "result" in message:
                    return dict(message["result"])
                error = message["error"]
                lacks = _wants_memory([error["message"]])
                raise RuntimeFailed(f"{self.title}: {error['message']}", kind="oom" if lacks else error["kind"])
        finally:
            if not whole:
                self._end()

    def _send(self, operation: str, arguments: Mapping[str, Any]) -> None:
        line = json.dumps({"operation": operation, "arguments": dict(arguments)}).encode() + b"\n"
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):  # gone, or closed by us
            raise self._ending(f"before `{operation}`") from None

    def _receive(self, operation: str, timeout: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            raise RuntimeFailed(
                self._message(f"no answer to `{operation}` for {timeout:g} s; it was ended"), kind="hang"
            ) from None
        if not line:
            raise self._ending(f"during `{operation}`")
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict) or not {"event", "result", "error"} & message.keys():
            raise RuntimeFailed(
                self._message(f"its answer to `{operation}` is no JSON message: {line[:80]!r}"), kind="protocol"
            )
        return message

    def _ending(self, when: str) -> RuntimeFailed:
        """Why the process is gone, as an error to raise."""
        try:
            code = self._process.wait(_GOODBYE_SECONDS)
        except subprocess.TimeoutExpired:
            return RuntimeFailed(self._message(f"it closed its output {when} and went on running"), kind="protocol")
        self._readers[1].join(_GOODBYE_SECONDS)
        kind, what = self._diagnosis(code)
        hint = self._hint() if kind == "crash" and code < 0 else ""
        return RuntimeFailed(self._message(f"{what} {when}") + hint, kind=kind)

    def _diagnosis(self, code: int) -> tuple[str, str]:
        if code < 0 and -code == signal.SIGKILL:
            return ("oom", "killed for want of memory") if oom_kills() > self._kills_before else ("killed", "killed")
        if code and _wants_memory(self._errors):
            return "oom", "memory ran out"
        if code < 0:
            name = signal.Signals(-code).name
            kind = {signal.SIGABRT: "abort", signal.SIGXCPU: "hang"}.get(signal.Signals(-code), "crash")
            return kind, f"ended by {name}"
        return ("crash", f"ended with exit code {code}") if code else ("protocol", "ended without an answer")

    def _message(self, what: str) -> str:
        tail = "".join(f"\n  | {line}" for line in self._errors)
        return f"{self.title}: {what}{tail and '; its last lines:'}{tail}"

    def close(self) -> None:
        """End the child: its input closes, and what is still there after two seconds is killed."""
        self._end()
        for reader in self._readers:
            reader.join(_GOODBYE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _wants_memory(lines: Iterable[str]) -> bool:
    return any(word in line for line in lines for word in _MEMORY_WORDS)


def _read_answers(stream: IO[bytes], answers: queue.SimpleQueue[bytes]) -> None:
    with stream:
        while line := stream.readline(LONGEST_ANSWER):
            answers.put(line)
    answers.put(b"")


def _read_errors(stream: IO[bytes], tail: deque[str]) -> None:
    with stream:
        while line := stream.readline(1 << 14):
            tail.append(line.decode("utf-8", "replace").rstrip())


def _end_process(process: subprocess.Popen[bytes]) -> None:
    """Ask by closing its input, then kill the whole group: grandchildren too."""
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):  # gone already, with a request unread
            process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GOODBYE_SECONDS)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # no group left (macOS: EPERM for a zombie's)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _become(limits: Limits, parent: int, module: str) -> None:
    """Runs in the child: take the limits on, then become the worker. Exec keeps both."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limits.data is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limits.data, limits.data))
    if limits.cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, limits.cpus)
    if limits.cpu_seconds is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_seconds, limits.cpu_seconds + 1))
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        if ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, int(signal.SIGKILL), 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        sys.exit("the parent ended before its child began")
    os.execv(sys.executable, [sys.executable, "-P", "-m", module])


if __name__ == "__main__":
    _become(Limits(**json.loads(sys.argv[1])), int(sys.argv[2]), sys.argv[3])
