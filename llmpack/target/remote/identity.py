"""What a device is, asked in a shell: enough to know it again, where llmpack is not there to probe it.

Gives the same fingerprint as `target.probe` on the device itself. Linux and Android.
"""

from __future__ import annotations

import re

from llmpack.errors import DeviceProblem, EnvironmentProblem, RuntimeFailed
from llmpack.target.device import Device
from llmpack.target.probe import MEMORY_LIMITS, as_device, measured, parse_cpuinfo, usable_memory
from llmpack.target.remote.transport import Transport

_MARK = "== "
_SCRIPT = f"""
say() {{ echo "{_MARK}$1"; }}
say machine; uname -m
say kernel; echo "$(uname -s) $(uname -r)"
say memory; cat /proc/meminfo 2>/dev/null
say limits; cat {" ".join(MEMORY_LIMITS)} 2>/dev/null
say cores; cat /sys/devices/system/cpu/cpu*/topology/core_cpus_list 2>/dev/null || \
  cat /sys/devices/system/cpu/cpu*/topology/thread_siblings_list 2>/dev/null
say allowed; cat /proc/self/status 2>/dev/null
say load; cat /proc/loadavg 2>/dev/null
say cpuinfo; cat /proc/cpuinfo 2>/dev/null
exit 0
"""
_BY = "read in a shell on the device"


def identify(transport: Transport) -> tuple[Device, float | None]:
    """The device, and its load average. Raises DeviceProblem for one that tells too little, and as `Transport.run`."""
    name = transport.address.text
    reply = transport.run(_SCRIPT)
    parts = _parts(reply.text)
    total = re.search(r"^MemTotal:\s+(\d+) kB", parts.get("memory", ""), re.MULTILINE)
    if reply.code or "machine" not in parts:
        raise RuntimeFailed(f"{name}: does not say what it is: {reply.text[:80]!r}", kind="protocol")
    if total is None:
        text = f"{name}: only Linux and Android can be identified in a shell; install llmpack there"
        raise DeviceProblem(text, kind="unknown")
    machine = parts["machine"].strip()
    cpu, sets = parse_cpuinfo(parts.get("cpuinfo", ""), machine)
    memory = usable_memory(int(total[1]) << 10, parts.get("limits", "").splitlines())
    figures: dict[str, object] = {"memory": measured(f"{memory} B", _BY)}
    cores = _cores(parts)
    if cores:
        figures["cores"] = measured(cores, _BY)
    if sets:
        figures["instruction_sets"] = measured(sets, _BY)
    try:
        found = as_device(name, f"{cpu} at {name}", machine, cpu, parts.get("kernel", "").strip(), figures)
    except EnvironmentProblem as error:
        raise DeviceProblem(str(error), kind="unknown") from error
    load = parts.get("load", "").split()
    return found, float(load[0]) if load and re.fullmatch(r"[\d.]+", load[0]) else None


def _parts(text: str) -> dict[str, str]:
    found = {}
    for part in f"\n{text}".split(f"\n{_MARK}")[1:]:
        name, _, body = part.partition("\n")
        found[name] = body
    return found


def _cores(parts: dict[str, str]) -> int:
    """Physical cores that may be used; 0 where the system does not tell."""
    physical = len(set(parts.get("cores", "").split()))
    listed = re.search(r"^Cpus_allowed_list:\s*(\S+)", parts.get("allowed", ""), re.MULTILINE)
    if listed is None:
        return physical
    allowed = 0
    for span in listed[1].split(","):
        low, _, high = span.partition("-")
        allowed += int(high or low) - int(low) + 1
    return min(physical or allowed, allowed)
