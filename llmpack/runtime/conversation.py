"""The worker's side of a conversation with `llmpack.process.Child`. Standard library only, to stay small.

The worker's real standard output is kept for answers; what native code prints goes to standard error.
Requests are read by a thread of their own, so that the end of input (the parent closed it, or is
gone) ends the worker at once, even in the middle of a long computation.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

Tell = Callable[[Mapping[str, Any]], None]
Operation = Callable[[Mapping[str, Any], Tell], Mapping[str, Any]]


class RefusedError(Exception):
    """The worker cannot do what it was asked, and goes on living. `kind` is that of RuntimeFailed."""

    def __init__(self, message: str, kind: str = "refused") -> None:
        super().__init__(message)
        self.kind = kind


def serve(operations: Mapping[str, Operation]) -> None:
    """Answer requests until the input ends. An unforeseen exception ends the worker with its traceback."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.excepthook = _end_with_traceback
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()

    def say(message: Mapping[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    while True:
        request = json.loads(requests.get())
        try:
            result = operations[request["operation"]](request["arguments"], lambda event: say({"event": event}))
        except RefusedError as refusal:
            say({"error": {"kind": refusal.kind, "message": str(refusal)}})
        except MemoryError:
            say({"error": {"kind": "oom", "message": f"no memory for `{request['operation']}`"}})
        else:
            say({"result": result})


def _end_with_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    # no orderly shutdown: it would abort over the lock on standard input that the reading thread holds
    traceback.print_exception(kind, error, trace)
    sys.stderr.flush()
    os._exit(1)


def _read(requests: queue.SimpleQueue[bytes]) -> None:
    # os._exit: the main thread may be deep in native code and would never come back to be joined
    for line in sys.stdin.buffer:
        requests.put(line)
    os._exit(0)
