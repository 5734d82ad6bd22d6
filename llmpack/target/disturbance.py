"""What disturbs a measurement, as far as the system tells: heat, lack of power, other work, want of memory.

Linux: cooling devices and trip points of ``/sys/class/thermal``, the frequency limits of ``cpufreq``, the throttle
counts of x86, the Raspberry Pi's ``get_throttled``, stall times of ``/proc/pressure``, stolen time of virtual machines.
What a system does not have is not told. All of it makes a model slower and never faster: a limit of speed that is kept
all the same is kept; one that is broken is not proved to be (see `budget.judge`).
Sources: Linux Documentation/driver-api/thermal, cpu-freq and accounting/psi; Raspberry Pi documentation of vcgencmd.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

OTHER_SHARE = 0.2
"""Share of all processors' time that other processes may take."""
STALL_SHARE = 0.05
"""Share of the time in which everything may wait for memory, or which a virtual machine's host may take."""
_CPU_COOLING = re.compile("cpu|processor", re.IGNORECASE)
_PI_FLAGS = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")
"""Bits 0 to 3 of get_throttled: what holds now."""


@dataclass(frozen=True)
class Conditions:
    """The system at one moment; what it does not tell is absent.

    time         seconds of a clock that never goes back
    temperature  of the hottest zone, degrees Celsius
    hot          zones above a passive trip point, where the kernel slows the processor down
    limits       highest frequency that each policy allows now, Hz
    cooling      level of each cooling device of the processor, 0 for none
    throttled    how often the processor slowed itself down since boot (x86)
    flags        of a Raspberry Pi: what holds now
    stalled      seconds since boot in which every task waited for memory
    stolen       seconds of processor time that the host of a virtual machine took
    """

    time: float
    temperature: float | None = None
    hot: tuple[str, ...] = ()
    limits: Mapping[str, int] = field(default_factory=dict)
    cooling: Mapping[str, int] = field(default_factory=dict)
    throttled: int | None = None
    flags: tuple[str, ...] = ()
    stalled: float | None = None
    stolen: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """What the system told, as JSON values, without the clock."""
        told = {name: value for name, value in vars(self).items() if value not in (None, (), {}) and name != "time"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}


def conditions(root: Path = Path("/")) -> Conditions:
    """The system now; `root` holds ``proc`` and ``sys``. Never raises: a file that cannot be read tells nothing."""
    zones = [zone for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")) if _number(zone / "temp")]
    coolers = [
        c for c in (root / "sys/class/thermal").glob("cooling_device*") if _CPU_COOLING.search(_text(c / "type"))
    ]
    policies = sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*"))
    counts = [
        _number(file) for file in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/*_throttle_count")
    ]
    limits = {policy.name: _number(policy / "scaling_max_freq") for policy in policies}
    return Conditions(
        time=time.monotonic(),
        temperature=max((_number(zone / "temp") or 0) / 1000 for zone in zones) if zones else None,
        hot=tuple(_text(zone / "type") or zone.name for zone in zones if _is_hot(zone)),
        limits={name: 1000 * limit for name, limit in limits.items() if limit is not None},
        cooling={cooler.name: _number(cooler / "cur_state") or 0 for cooler in sorted(coolers)},
        throttled=sum(count or 0 for count in counts) if counts else None,
        flags=_pi_flags(root),
        stalled=_stalled(root),
        stolen=float(getattr(psutil.cpu_times(), "steal", 0.0)),
    )


def disturbances(seen: Sequence[Conditions], other_load: float) -> tuple[str, ...]:
    """What disturbed a run, in words, from the conditions before, during and after it.

    other_load  share of all processors' time that other processes took
    """
    first, last = seen[0], seen[-1]
    found = []
    if other_load > OTHER_SHARE:
        found.append(f"other processes took {other_load:.0%} of the processor")
    heat = sorted({zone for one in seen for zone in one.hot})
    lowered = [name for name, limit in first.limits.items() if any(one.limits.get(name, limit) < limit for one in seen)]
    cooled = any(level > 0 for one in seen for level in one.cooling.values())
    slowed = first.throttled is not None and last.throttled is not None and last.throttled > first.throttled
    if heat or lowered or cooled or slowed:
        highest = max((one.temperature for one in seen if one.temperature is not None), default=None)
        found.append("the processor was throttled" + (f" at {highest:.0f} degrees Celsius" if highest else ""))
    flags = sorted({flag for one in seen for flag in one.flags})
    if flags:
        found.append(f"the board reports {', '.join(flags)}")
    wall = max(last.time - first.time, 1e-9)
    if first.stalled is not None and last.stalled is not None and (last.stalled - first.stalled) / wall > STALL_SHARE:
        found.append(f"all work waited for memory for {(last.stalled - first.stalled) / wall:.0%} of the time")
    stolen = (last.stolen - first.stolen) / (wall * (psutil.cpu_count() or 1))
    if stolen > STALL_SHARE:
        found.append(f"the virtual machine's host took {stolen:.0%} of the processor")
    return tuple(found)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _is_hot(zone: Path) -> bool:
    """Whether a zone is above a trip point at which the kernel throttles."""
    temperature = _number(zone / "temp") or 0
    for kind in zone.glob("trip_point_*_type"):
        limit = _number(kind.with_name(kind.name.removesuffix("_type") + "_temp"))
        if _text(kind) == "passive" and limit is not None and 0 < limit <= temperature:
            return True
    return False


def _pi_flags(root: Path) -> tuple[str, ...]:
    text = _text(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    value = int(text, 16) if re.fullmatch("(0x)?[0-9a-fA-F]+", text) else 0
    return tuple(name for bit, name in enumerate(_PI_FLAGS) if value >> bit & 1)


def _stalled(root: Path) -> float | None:
    found = re.search(r"^full .*total=(\d+)", _text(root / "proc/pressure/memory"), re.MULTILINE)
    return int(found[1]) / 1e6 if found else None
