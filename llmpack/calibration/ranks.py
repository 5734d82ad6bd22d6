"""Several processes that train together, as `accelerate launch` and `torchrun` start them.

All run the same command. The first (rank 0) does the work; the others wait until it trains, train with it, and wait
again until it sends them home. On several machines they share the folders of the cache and of the source.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import accelerate
    import torch
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")
    accelerate = LazyModule("accelerate")

PATIENCE = timedelta(days=30)
"""How long the others wait for the first, which may have hours of other steps to do."""


def count() -> int:
    """How many processes there are; 1 unless a launcher says otherwise."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def follows() -> bool:
    """Whether this is one of the others."""
    return count() > 1 and int(os.environ.get("RANK", "0")) > 0


def threads(whole: int) -> int:
    """Threads of this process, of those that all on this machine may use."""
    return max(1, whole // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def accelerator(precision: str) -> Any:
    """accelerate's view of this process. `precision`: "no" or "bf16" products inside models."""
    _join()
    # two steps of one recipe may differ in precision, which accelerate allows once in a process
    accelerate.state.AcceleratorState._reset_state()
    return accelerate.Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available())


def call(job: Mapping[str, Any] | None) -> None:
    """Tell the others what to do; None sends them home."""
    if count() > 1:
        _join()
        accelerate.utils.broadcast_object_list([job], from_process=0)


def called() -> Mapping[str, Any] | None:
    """Wait for what the first says."""
    _join()
    jobs: list[Mapping[str, Any] | None] = [None]
    accelerate.utils.broadcast_object_list(jobs, from_process=0)
    return jobs[0]


def _join() -> None:
    kwargs = {"timeout": PATIENCE} if count() > 1 else {}
    accelerate.PartialState(cpu=not torch.cuda.is_available(), **kwargs)
