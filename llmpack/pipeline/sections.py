"""The tables that a recipe and a budget file share."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from llmpack.documented import Documented

Text = Annotated[str, Field(min_length=1, max_length=4096)]


class Section(Documented):
    """A table of the recipe: unknown keys are errors, types are exact, nothing changes after reading."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class TargetSection(Section):
    """`[target]`: the device that the bundle is for."""

    device: Text = "host"
    """A name of `llmpack list devices`, a profile's file (`board.toml`), or `host`: this machine as it is found."""
    devices: tuple[Text, ...] = ()
    """Several devices instead of one: the bundle is built once and judged for each; measured on this one alone."""
    accept: Literal["measurement", "estimate"] = "measurement"
    """`estimate` lets a bundle pass on computed figures, for a device that is not at hand; the manifest says so."""

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if self.devices and self.device != "host":
            raise ValueError(f'device = "{self.device}" and devices exclude each other; name them all in devices')
        twice = sorted({name for name in self.devices if self.devices.count(name) > 1})
        if twice:
            raise ValueError(f"devices names {', '.join(twice)} twice")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The devices that are judged for."""
        return self.devices or (self.device,)
