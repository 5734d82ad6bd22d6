"""What this machine is: read from the system, bandwidth measured by streaming through memory, the disk by reading."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil

from llmpack.errors import EnvironmentProblem
from llmpack.progress import QUIET, Progress
from llmpack.runtime.settings import usable_cores
from llmpack.target.device import HOST, Device
from llmpack.target.page_cache import measure_storage
from llmpack.target.speed_model import Rates
from llmpack.units import format_size

# /proc/cpuinfo's words for the instruction sets that matter (x86 "flags", ARM "Features")
_FLAGS = {
    "avx": "avx", "avx2": "avx2", "avx512f": "avx512", "avx512_vnni": "avx512_vnni", "avx_vnni": "avx_vnni",
    "bmi2": "bmi2", "f16c": "f16c", "fma": "fma", "amx_int8": "amx_int8",
    "asimd": "neon", "asimdhp": "fp16", "asimddp": "dotprod", "i8mm": "i8mm", "sve": "sve", "sme": "sme",
}  # fmt: skip
_ARCHES = {"x86_64": "x86_64", "AMD64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64", "riscv64": "riscv64"}
_UNLIMITED = 1 << 60  # cgroups write "no limit" as a number near 2^63
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container's limit stands (cgroup v2, v1)."""
STREAM_BYTES = 128 << 20
PRODUCT = 1536


def probe_host(*, rates: bool = False) -> Device:
    """This machine as a device.

    rates  also measure: stream through memory, multiply matrices; takes a second or two

    Raises EnvironmentProblem on an architecture that llmpack does not know.
    """
    model, flags = _cpuinfo()
    figures: dict[str, object] = {
        "memory": measured(f"{memory_of_host()} B", "the system's count, or the container's limit"),
        "cores": measured(usable_cores(), "physical cores that this process may use"),
    }
    if flags:
        figures["instruction_sets"] = measured(flags, "the processor's own flags")
    for level, size in _caches().items():
        figures[level] = measured(f"{size} B", "the system's description of the first core")
    if rates:
        figures["bandwidth"] = measured(
            f"{measure_bandwidth(usable_cores())} B/s", "streamed from memory by all cores, best of five"
        )
        figures["f32"] = measured(
            f"{measure_f32() / 1e9:f} GFLOP/s",
            f"numpy's product of matrices of {PRODUCT} x {PRODUCT}, best of five",
        )
        storage = measure_storage(Path.cwd())
        if storage is not None:
            how = "a file in the current folder, not cached, read in order, best of three"
            figures["storage"] = measured(f"{storage} B/s", how)
    kernel = f"{platform.system()} {platform.release()}"
    return as_device(HOST, f"this machine: {model}", platform.machine(), model, kernel, figures)


def as_device(
    name: str, description: str, machine: str, cpu: str, kernel: str, figures: Mapping[str, object]
) -> Device:
    """A device from what a system tells; `machine` is its own word for the architecture.

    Raises EnvironmentProblem on an architecture that llmpack does not know.
    """
    if machine not in _ARCHES:
        raise EnvironmentProblem(f"the architecture {machine!r} of {name} is unknown; known: {', '.join(_ARCHES)}")
    table = {
        "name": name,
        "description": description,
        "arch": _ARCHES[machine],
        "cpu": cpu,
        "kernel": kernel,
        "figures": figures,
    }
    return Device.model_validate(table)


def with_runtime(found: Device, progress: Progress = QUIET) -> Device:
    """The device with the kernels of llama.cpp timed too, which takes minutes. Raises as `time_kernels`."""
    from llmpack.target.kernel_rates import time_kernels

    return with_rates(found, time_kernels(found.cores or 1, progress=progress))


def with_rates(found: Device, rates: Rates) -> Device:
    """The device with these rates of its kernels."""
    how = "llama.cpp on blank models with every core, median of several"
    timed: dict[str, object] = {
        "kernels": {name: kernel.model_dump(mode="json") for name, kernel in rates.kernels.items()},
        "attention": {name: rate.model_dump(mode="json") for name, rate in rates.attention.items()},
        "cache_kept": f"{int(rates.cache)} B",
        "elementwise": f"{rates.elementwise / 1e9:f} GFLOP/s",
        "block_overhead": f"{rates.overhead:.9f} s",
    }
    if "q8_0" in rates.kernels:
        timed["int8"] = f"{rates.kernels['q8_0'].prefill / 1e9:f} GFLOP/s"
    values = found.model_dump(mode="json")
    figures = {name: figure for name, figure in values["figures"].items() if figure is not None}
    figures |= {name: measured(value, how) for name, value in timed.items()}
    return Device.model_validate_json(json.dumps({**values, "figures": figures}))


def is_this_machine(profile: Device) -> bool:
    """Whether what is measured here holds for that device: same processor, cores, instruction sets and memory.

    Raises EnvironmentProblem if it is this machine and has less memory than the profile promises.
    """
    here = probe_host()
    if profile.fingerprint == here.fingerprint:
        return True
    with_our_memory = profile.figures.model_copy(update={"memory": here.figures.memory})
    if profile.model_copy(update={"figures": with_our_memory}).fingerprint != here.fingerprint:
        return False
    if here.memory < profile.memory:
        text = (
            f"this machine has {format_size(here.memory)} of memory, {profile.name} says {format_size(profile.memory)}"
        )
        raise EnvironmentProblem(f"{text}; mend the profile (`llmpack device probe` writes one), or lift the limit")
    return False


def measured(value: object, source: str) -> dict[str, object]:
    """A figure that was found on the machine itself."""
    return {"value": value, "provenance": "measured", "source": source}


def _cpuinfo() -> tuple[str, tuple[str, ...]]:
    """Model name and known instruction sets of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), ()
    return parse_cpuinfo(text, platform.machine())


def parse_cpuinfo(text: str, machine: str) -> tuple[str, tuple[str, ...]]:
    """Model name and known instruction sets from the text of /proc/cpuinfo; `machine` names what tells no model."""
    facts: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    words = (facts.get("flags") or facts.get("Features") or "").split()
    flags = tuple(ours for theirs, ours in _FLAGS.items() if theirs in words)
    vector = facts.get("isa", "")  # RISC-V: "rv64imafdcv_..."
    if vector.startswith("rv64") and "v" in vector.removeprefix("rv64").partition("_")[0]:
        flags = (*flags, "rvv")
    model = facts.get("model name") or facts.get("Model") or _arm_model(facts, machine)
    return model, flags


def _arm_model(facts: dict[str, str], machine: str) -> str:
    parts = (facts.get("CPU implementer", ""), facts.get("CPU part", ""))
    return f"ARM implementer {parts[0]} part {parts[1]}" if all(parts) else machine


def memory_of_host() -> int:
    """Bytes of memory that this process may use at most: the machine's, or the container's limit."""
    texts = []
    for path in MEMORY_LIMITS:
        with suppress(OSError):
            texts.append(Path(path).read_text())
    return usable_memory(int(psutil.virtual_memory().total), texts)


def usable_memory(total: int, limits: Iterable[str]) -> int:
    """The least of a machine's memory and of what the files of `MEMORY_LIMITS` say."""
    numbers = (int(text.strip()) for text in limits if text.strip().isdigit())
    return min([total, *(number for number in numbers if number < _UNLIMITED)])


def measure_bandwidth(threads: int) -> int:
    """Bytes per second that `threads` cores read from memory together, best of five passes.

    Each scans an array of its own that no cache holds, for a byte that is not there.
    """
    arrays = [np.ones(STREAM_BYTES, np.bool_) for _ in range(threads)]
    for array in arrays:
        array[:] = False  # written once, so that every page is real
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            started = time.perf_counter()
            list(pool.map(np.any, arrays))
            best = min(best, time.perf_counter() - started)
    return int(threads * STREAM_BYTES / best)


def measure_f32() -> float:
    """Operations per second of a large matrix product in float32 with the BLAS of numpy, best of five."""
    a = np.ones((PRODUCT, PRODUCT), np.float32)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * PRODUCT**3 / best


def _caches() -> dict[str, int]:
    """Bytes of the data caches that the first core sees, by name of figure; Linux only."""
    found: dict[str, int] = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind, level, size = ((folder / name).read_text().strip() for name in ("type", "level", "size"))
        except OSError:
            continue
        name = {"1": "cache_l1d", "2": "cache_l2", "3": "cache_l3"}.get(level)
        if name and kind in ("Data", "Unified") and size.endswith("K") and size[:-1].isdigit():
            found[name] = int(size[:-1]) << 10
    return found


def load_average() -> float | None:
    """Processes that wanted to run over the last minute, if the system tells."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
