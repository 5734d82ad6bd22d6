"""Rows of the lists: what recipes may name, and what the cache holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmpack.errors import UsageError
from llmpack.registry import suggestion
from llmpack.units import format_seconds, format_size

if TYPE_CHECKING:
    from llmpack.pipeline.cache import Cache, Entry
    from llmpack.target.device import Device

Rows = list[dict[str, Any]]
SHORT_KEY = 12


def listing(what: str) -> Rows:
    """The rows of one list. Raises UsageError for an unknown one."""
    lists: dict[str, Callable[[], Rows]] = {
        "steps": _steps,
        "encodings": _encodings,
        "layouts": _layouts,
        "devices": devices,
        "families": _families,
    }
    if what not in lists:
        raise UsageError(f"there is no list of `{what}`{suggestion(what, lists)}")
    return lists[what]()


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().partition("\n")[0]


def _steps() -> Rows:
    from llmpack.steps import STEPS

    return [
        {"step": name, "options": ", ".join(n for n in kind.model_fields if n != "use"), "meaning": _first_line(kind)}
        for name, kind in STEPS.items()
    ]


def _encodings() -> Rows:
    from llmpack.encodings import ENCODINGS

    rows = []
    for name, kind in ENCODINGS.items():
        made = kind()
        rows.append(
            {
                "encoding": name,
                "bits per weight": round(made.bits_per_weight, 4),
                "block": made.block,
                "GGUF type": made.ggml_type,
                "meaning": _first_line(kind),
            }
        )
    return rows


def _layouts() -> Rows:
    from llmpack.formats.layouts import LAYOUTS

    return [{"layout": name, "meaning": _first_line(kind)} for name, kind in LAYOUTS.items()]


def _families() -> Rows:
    from llmpack.models import FAMILIES

    return [
        {"family": name, "architectures": ", ".join(kind.architectures), "meaning": _first_line(kind)}
        for name, kind in FAMILIES.items()
    ]


def devices() -> Rows:
    """Every profile of the package."""
    from llmpack.target.device import device, device_names

    rows = []
    for name in device_names():
        found = device(name)
        bandwidth = f"{found.bandwidth / 1e9:.4g} GB/s" if found.bandwidth else "unknown"
        rows.append(
            {
                "device": name,
                "memory": format_size(found.memory),
                "bandwidth": bandwidth,
                "meaning": found.description,
            }
        )
    return rows


def device_rows(found: Device) -> Rows:
    """Every figure of a device with why it is believed, and what follows from its instruction sets."""
    rows = []
    for name, figure in found.figures.model_dump(mode="json").items():
        if figure is None:
            rows.append({"figure": name, "value": "unknown", "provenance": "", "date": "", "source": ""})
            continue
        shown = getattr(found.figures, name).value
        rows.append(
            {
                "figure": name,
                "value": _shown(name, shown),
                "provenance": figure["provenance"],
                "date": figure["date"],
                "source": figure["source"],
            }
        )
    return rows


_UNITS: dict[str, tuple[float, str]] = {
    "bandwidth": (1e9, "GB/s"),
    **dict.fromkeys(("arithmetic", "f32", "int8", "elementwise"), (1e9, "GFLOP/s")),
    "block_overhead": (1e-6, "us"),
}


def _shown(name: str, value: Any) -> str:
    if name in _UNITS:
        scale, unit = _UNITS[name]
        return f"{value / scale:.4g} {unit}"
    if name == "memory" or name.startswith("cache"):
        return format_size(value)
    if isinstance(value, dict):
        return ", ".join(value)
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def cache_rows(cache: Cache) -> Rows:
    """Every entry of the cache."""
    from llmpack.pipeline.cache import folder_bytes

    rows = []
    for kind, key, folder, entry, trouble in cache.entries():
        rows.append(
            {
                "kind": kind,
                "key": key[:SHORT_KEY],
                "size": format_size(folder_bytes(folder)),
                "unused for": format_seconds(max(0.0, time.time() - folder.stat().st_mtime)),
                "state": trouble or ("whole" if entry else "unfinished"),
                "what": _what(entry),
            }
        )
    return rows


def _what(entry: Entry | None) -> str:
    if entry is None:
        return ""
    facts = entry.facts
    named = facts.get("step") or facts.get("name") or ""
    options = facts.get("options")
    encoding = options.get("encoding") if isinstance(options, dict) else None
    return " ".join(str(part) for part in (named, encoding) if part)


def cache_damage(cache: Cache) -> Rows:
    """The damaged entries of the cache; reads every byte."""
    rows = []
    for kind, key, _, entry, trouble in cache.entries():
        found = trouble or (entry.damage(thorough=True) if entry else None)
        if found:
            rows.append({"kind": kind, "key": key[:SHORT_KEY], "damage": found})
    return rows


def collect(cache: Cache, days: float, key: str | None) -> Rows:
    """Remove entries and say which."""
    if key is not None:
        return [{"key": removed[:SHORT_KEY]} for removed in cache.remove(key)]
    return [
        {"kind": kind, "key": gone[:SHORT_KEY], "size": format_size(nbytes)}
        for kind, gone, nbytes in cache.collect(days)
    ]
