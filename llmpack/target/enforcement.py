"""A measured process held to a budget of memory, and what became of it if it wanted more.

What holds it, the strictest that works here:

cgroup  where a folder was delegated (see `target.memory_group`): private memory and pages of files, by the kernel
rlimit  else RLIMIT_DATA, on private memory: the budget and what llama.cpp reserves without touching it; of other
        runtimes nobody knows what they reserve, and this is left out
watch   always: resident memory, looked at fifty times a second; a process that exceeds the budget is ended

A process that is ended, or refused memory, is an answer and not a failure: it comes back as `Exceeded`, whose finding
breaks the limit.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from llmpack.errors import RuntimeFailed
from llmpack.process import Limits
from llmpack.runtime.meter import Memory, Watch
from llmpack.runtime.runtime import Runtime
from llmpack.runtime.settings import RuntimeSettings
from llmpack.target.budget import Evidence, Finding
from llmpack.target.device import Device
from llmpack.target.memory_group import Hierarchy, MemoryGroup, memory_group
from llmpack.target.memory_model import padded
from llmpack.target.outline import Outline
from llmpack.units import format_size

MIB = 1 << 20
_STACKS_AND_INTERPRETER = 96 * MIB
"""Private memory beside the model: stacks of threads, which are reserved whole, and the interpreter."""
_RESERVATION_MARGIN = 1.1


class CapExceededError(Exception):
    """The measured process wanted more than its budget; `memory` is the most that was seen of it."""

    def __init__(self, means: str, memory: Memory) -> None:
        super().__init__(means)
        self.means = means
        self.memory = memory


@dataclass(frozen=True)
class Exceeded:
    """A run that ended because it wanted more memory than its budget.

    means   what ended it
    memory  the most that was seen of it: a lower bound of what it needs
    """

    artifact: str
    device: Device
    settings: RuntimeSettings
    context: int
    cap: int
    means: str
    memory: Memory

    def findings(self) -> list[Finding]:
        """The one figure that is known: memory, above the budget."""
        evidence = Evidence(
            kind="measurement",
            artifact=self.artifact,
            device=self.device.fingerprint,
            machine=self.device.description,
            settings={
                **self.settings.model_dump(mode="json"),
                "threads": self.settings.effective_threads,
                "context": self.context,
            },
        )
        value = max(self.memory.peak, self.cap + 1)
        return [Finding(limit="memory", value=value, best=value, evidence=evidence, reason=f"more: {self.means}")]

    def to_json(self) -> dict[str, Any]:
        """JSON values for reports."""
        return {
            "kind": "measurement",
            "protocol": "bench/1",
            "exceeded": self.means,
            "artifact": self.artifact,
            "fingerprint": self.device.fingerprint,
            "settings": self.settings.model_dump(mode="json"),
            "context": self.context,
            "cap": self.cap,
            "memory": asdict(self.memory),
        }


@dataclass(frozen=True)
class Held:
    """A runtime under a cap.

    means  what holds it, in words; empty without a cap
    """

    runtime: Runtime
    watch: Watch
    means: str


@contextmanager
def held(
    kind: type[Runtime],
    cap: int | None,
    cpus: Sequence[int],
    reserved: int | None,
) -> Iterator[Held]:
    """A fresh runtime on these processors, held to `cap` bytes.

    reserved  bytes that it reserves without touching them (see `reserved_bytes`), None where that is not known

    Raises CapExceededError where it wanted more, RuntimeFailed as the runtime does for other reasons.
    """
    hierarchy = Hierarchy.find() if cap is not None else None
    data = None
    if cap is not None and hierarchy is None and reserved is not None:
        data = cap + int(_RESERVATION_MARGIN * reserved) + _STACKS_AND_INTERPRETER
    with kind(Limits(data=data, cpus=tuple(cpus))) as runtime:
        watch = Watch(runtime.pid, limit=cap, exceeded=lambda: _end(runtime.pid))
        with _grouped(hierarchy, runtime.pid, cap) as group, watch:
            try:
                yield Held(runtime, watch, _means(cap, group, data))
            except RuntimeFailed as failure:
                reason = _reason(failure, watch, group, cap, data)
                if reason is None:
                    raise
                raise CapExceededError(reason, watch.highest) from failure
            finally:
                runtime.close()  # before its group is removed


@contextmanager
def _grouped(hierarchy: Hierarchy | None, pid: int, cap: int | None) -> Iterator[MemoryGroup | None]:
    if hierarchy is None or cap is None:
        yield None
        return
    with memory_group(hierarchy, pid, cap) as group:
        yield group


def _means(cap: int | None, group: MemoryGroup | None, data: int | None) -> str:
    if cap is None:
        return ""
    if group is not None:
        return f"held to {format_size(cap)} by a cgroup (v{group.version}) and a watch on resident memory"
    watched = f"held to {format_size(cap)} by a watch on resident memory"
    private = "" if data is None else f", and private memory to {format_size(data)} by RLIMIT_DATA"
    return f"{watched}{private}; no cgroup was delegated"


def _reason(
    failure: RuntimeFailed, watch: Watch, group: MemoryGroup | None, cap: int | None, data: int | None
) -> str | None:
    """Why the budget ended the run; None if something else did."""
    if cap is None:
        return None
    if watch.broken:
        return f"ended when {format_size(watch.highest.peak)} were resident"
    if group is not None and group.kills:
        return f"ended by the kernel in a cgroup of {format_size(cap)}"
    if failure.kind == "oom" and data is not None:
        return f"refused memory beyond {format_size(data)} of private memory (RLIMIT_DATA)"
    return None


def _end(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def reserved_bytes(outline: Outline, settings: RuntimeSettings, context: int) -> int:
    """Bytes of the compute buffer that llama.cpp reserves; a run touches far fewer of them.

    Fitted to llama.cpp at 0c1e57098 on five shapes, contexts to 32k and two batch sizes; 7 % off at most.
    """
    tokens, seen = min(settings.ubatch, context), padded(context)
    logits = 4 * (outline.vocab + 2 * outline.hidden)
    activations = 4 * (3 * outline.ffn + 4 * outline.hidden) + 2 * seen
    if settings.flash_attention != "off":
        return tokens * max(logits, activations)
    return tokens * max(logits, activations + 2 * seen, 4 * seen * (outline.heads + 1) + 28 * outline.hidden)
