"""What the result of a piece of work depends on: the facts from which cache keys are computed.

Nothing here names a date, a host, a user or a path. Versions are read from package metadata, so that a key
costs no import of torch.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmpack.calibration import ranks
from llmpack.encodings import ENCODINGS
from llmpack.models import FAMILIES
from llmpack.models.graph import ModelGraph
from llmpack.pipeline.gpu import gpu_class
from llmpack.steps.step import Processor, Step

ARITHMETIC = ("torch", "transformers", "numpy", "llama-cpp-python")
"""Packages whose version may change the last bit of a result."""

_FEATURES = {
    *(
        "avx",
        "avx2",
        "avx512f",
        "avx512bw",
        "avx512vl",
        "avx512_vnni",
        "avx512_bf16",
        "avx_vnni",
        "amx_tile",
        "fma",
        "f16c",
    ),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2", "fphp"),
}


def installed(package: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def instruction_sets() -> tuple[str, ...]:
    """The vector extensions of this processor that change which kernels run."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return ()
    for line in info.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return tuple(sorted(_FEATURES & set(value.split())))
    return ()


def platform_class(threads: int, processor: Processor = "cpu") -> dict[str, Any]:
    """Machines of one class give the same bytes: architecture, instruction sets, threads, versions of packages.

    processor  what runs the blocks; a GPU is part of the class where it does
    """
    return {
        **({} if processor == "cpu" else {"gpu": gpu_class()}),
        "machine": platform.machine(),
        "instructions": list(instruction_sets()),
        "threads": threads,
        "packages": {name: installed(name) for name in ARITHMETIC},
    }


def step_facts(
    step: Step,
    *,
    source: str,
    origin: str,
    corpus: str | None,
    seed: int,
    graph: ModelGraph,
    threads: int,
    processor: Processor = "cpu",
) -> dict[str, Any]:
    """Everything that the checkpoint which a step writes depends on.

    source  digest of the checkpoint that it reads
    origin  digest of the source model, which steps may compare with
    corpus  digest of the tokens it learns from, None if it needs none
    graph   what its preview promises
    """
    names = sorted({spec.encoding for spec in graph.tensors})
    together = {"processes": ranks.count()} if step.trains and ranks.count() > 1 else {}
    engine = {"engine": {name: installed(name) for name in step.packages}} if step.packages else {}
    return {
        **together,
        **engine,
        "step": step.use,
        "version": step.version,
        "options": step.model_dump(mode="json", exclude=set(step.unkeyed)),
        "input": source,
        "origin": origin,
        "corpus": corpus if step.needs_corpus else None,
        "seed": seed,
        "family": {"name": graph.family, "version": FAMILIES.load(graph.family).version},
        "encodings": {name: ENCODINGS.load(name).version for name in names},
        "platform": platform_class(threads, processor if step.walks else "cpu"),
    }


def import_facts(digest: str, dtype: str, encodings: Iterable[str]) -> dict[str, Any]:
    """Everything that the checkpoint imported from a GGUF file depends on; `encodings` are those of its tensors."""
    return {
        "file": digest,
        "dtype": dtype,
        "encodings": {name: ENCODINGS.load(name).version for name in sorted(encodings)},
        "packages": {name: installed(name) for name in ("transformers", "tokenizers")},
    }


def file_facts(path: Path) -> dict[str, Any]:
    """What tells an unchanged file from a changed one without reading it. Only for remembering digests."""
    status = path.stat()
    resolved = path.resolve()
    return {"path": str(resolved), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}
