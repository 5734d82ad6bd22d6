"""The tables that a recipe and a budget file share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(min_length=1, max_length=4096)]


class Section(BaseModel):
    """A table of the recipe: unknown keys are errors, types are exact, nothing changes after reading."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class TargetSection(Section):
    """`[target]`: the device that the bundle is for."""

    device: Text = "host"
    """A name of `llmpack list devices`, or `host`: this machine as it is found."""
    accept: Literal["measurement", "estimate"] = "measurement"
    """`estimate` lets a bundle pass on computed figures, for a device that is not at hand; the manifest says so."""
