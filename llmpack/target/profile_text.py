"""A device as the text of a profile: what `llmpack device probe` writes and `device` reads."""

from __future__ import annotations

import json
from typing import Any

from llmpack.target.device import Device


def profile_text(found: Device, date: str, description: str = "") -> str:
    """TOML of a profile.

    date         of the figures that have none: the day of the probe
    description  instead of the device's own
    """
    values = found.model_dump(mode="json")
    lines = [
        f"description = {_toml(description or values['description'])}",
        *(f"{key} = {_toml(values[key])}" for key in ("arch", "cpu", "kernel")),
    ]
    for name, figure in values["figures"].items():
        if figure is not None:
            figure["date"] = figure["date"] or date
            lines += ["", f"[figures.{name}]", *(f"{key} = {_toml(value)}" for key, value in figure.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(inner) for inner in value) + "]"
    return json.dumps(value, ensure_ascii=False)
