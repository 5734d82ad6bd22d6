"""Devices: what a machine offers to a model, each figure with where it comes from.

A profile is one TOML file in ``target/devices/``; "host" is this machine as it is found. A figure
without a source is left out, never guessed, and what depends on it stays unmeasured.
"""

from __future__ import annotations

import re
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from llmpack.digest import sha256_value
from llmpack.encodings import ENCODINGS
from llmpack.errors import Problem, RecipeError
from llmpack.registry import suggestion
from llmpack.target.quantities import Bandwidth, Flops, Seconds, Size

HOST = "host"
INSTRUCTION_SETS = (
    "avx", "avx2", "avx512", "avx512_vnni", "avx_vnni", "bmi2", "f16c", "fma", "amx_int8",
    "neon", "fp16", "dotprod", "i8mm", "sve", "sme", "rvv",
)  # fmt: skip
"""Names of the instruction sets that decide which kernels of the runtime are used."""

T = TypeVar("T")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Figure(_Strict, Generic[T]):
    """One number of a device, and why it is believed."""

    value: T
    provenance: Literal["measured", "datasheet"]
    """"measured" on such a machine, or read in its maker's papers."""
    source: str = Field(min_length=8)
    """Who measured it or which paper says it."""
    date: str = Field(default="", pattern=r"^(\d{4}(-\d{2}(-\d{2})?)?)?$")
    """Year, month or day of the source; empty for this machine as it is found now."""


SHORT_ROW, LONG_ROW = 512, 2048
"""Numbers in the rows of weights whose kernels are timed."""


def shortness(row: int) -> float:
    """Where a row of so many numbers stands between `LONG_ROW` (0) and `SHORT_ROW` (1), in the reciprocal of length."""
    inside = min(max(row, SHORT_ROW), LONG_ROW)
    return (1 / inside - 1 / LONG_ROW) / (1 / SHORT_ROW - 1 / LONG_ROW)


class Kernel(_Strict):
    """How fast llama.cpp works with weights in one encoding, all cores together."""

    decode: Bandwidth
    """Bytes of weights per second when tokens are written one at a time, of rows of `LONG_ROW` numbers and more."""
    short: Bandwidth
    """The same of rows of `SHORT_ROW` numbers and fewer."""
    cached: Bandwidth
    """The same of a model so small that a cache may hold it."""
    prefill: Flops
    """Operations per second when a prompt is read."""

    @classmethod
    def of(cls, decode: float, short: float, cached: float, prefill: float) -> Kernel:
        """From numbers."""
        writing = {"decode": f"{int(decode)} B/s", "short": f"{int(short)} B/s", "cached": f"{int(cached)} B/s"}
        return cls.model_validate({**writing, "prefill": f"{prefill / 1e9:f} GFLOP/s"})

    def decode_seconds(self, nbytes: float, row: int, held: float = 0.0) -> float:
        """Seconds that a matrix with rows of so many numbers takes when a token is written.

        held  the share of it that a cache still has from the token before

        Between the rates the time of a byte is linear in the reciprocal of a row's length, as that of a row is then
        linear in its length.
        """
        part = shortness(row)
        fetched = (1 - part) / self.decode + part / self.short
        return nbytes * ((1 - held) * fetched + held / self.cached)


class AttentionRate(_Strict):
    """How fast llama.cpp attends over a cache of one type with heads of one width, of which some share a key."""

    decode: Flops
    """Operations per second when tokens are written one at a time."""
    prefill: Flops
    """Operations per second when a prompt is read."""

    @classmethod
    def of(cls, decode: float, prefill: float) -> AttentionRate:
        """From numbers."""
        texts = {"decode": f"{decode / 1e9:f} GFLOP/s", "prefill": f"{prefill / 1e9:f} GFLOP/s"}
        return cls.model_validate(texts)


class Figures(_Strict):
    """The figures of a device; those that are not known are absent."""

    memory: Figure[Size]
    """Memory of the machine; a container's limit where one holds."""
    cores: Figure[int] | None = None
    """Physical cores that help a model (the big ones, on mixed processors)."""
    instruction_sets: Figure[tuple[str, ...]] | None = None
    """Which of `INSTRUCTION_SETS` it has."""
    bandwidth: Figure[Bandwidth] | None = None
    """Bytes per second from memory: the nominal peak, or streamed by all cores where it was measured."""
    decode_efficiency: Figure[float] | None = None
    """Share of `bandwidth` that decoding reaches in llama.cpp."""
    arithmetic: Figure[Flops] | None = None
    """Operations per second that prompt processing reaches in llama.cpp (2 per weight and token)."""
    f32: Figure[Flops] | None = None
    """Operations per second of a large matrix product in f32, all cores."""
    int8: Figure[Flops] | None = None
    """Operations per second of llama.cpp's products of 8-bit weights (q8_0), all cores."""
    cache_l1d: Figure[Size] | None = None
    """First-level data cache of one core."""
    cache_l2: Figure[Size] | None = None
    """Second-level cache of one core (or of the cores that share it)."""
    cache_l3: Figure[Size] | None = None
    """Third-level cache that one core sees."""
    storage: Figure[Bandwidth] | None = None
    """Bytes per second that a file which is not cached is read with, in order."""
    cache_kept: Figure[Size] | None = None
    """Bytes of a model that caches keep from one written token to the next, fewer than they have where others use them
    too; measured by `llmpack device probe --runtime`."""
    kernels: Figure[dict[str, Kernel]] | None = None
    """Rates of llama.cpp by encoding of the weights, measured by `llmpack device probe --runtime`."""
    attention: Figure[dict[str, AttentionRate]] | None = None
    """Rates of attention by type of the KV cache, width of a head and how many share a key ("f16@64/4"); likewise."""
    elementwise: Figure[Flops] | None = None
    """Numbers per second in everything that is no product of matrices, when a prompt is read; likewise."""
    block_overhead: Figure[Seconds] | None = None
    """Seconds that each block costs a written token whatever its size: threads that wait for each other; likewise."""

    @field_validator("instruction_sets", mode="before")
    @classmethod
    def _as_tuple(cls, table: object) -> object:
        if isinstance(table, dict) and isinstance(table.get("value"), list):
            return {**table, "value": tuple(table["value"])}
        return table

    @field_validator("instruction_sets")
    @classmethod
    def _known(cls, figure: Figure[tuple[str, ...]] | None) -> Figure[tuple[str, ...]] | None:
        for name in figure.value if figure else ():
            if name not in INSTRUCTION_SETS:
                raise ValueError(f"unknown instruction set {name!r}{suggestion(name, INSTRUCTION_SETS)}")
        return figure

    @field_validator("kernels", "attention")
    @classmethod
    def _rates(cls, figure: Figure[dict[str, Any]] | None, info: ValidationInfo) -> Figure[dict[str, Any]] | None:
        """Each has the name of something that the runtime has, and rates that a machine can have."""
        for name, rate in (figure.value if figure else {}).items():
            if info.field_name == "kernels" and name not in ENCODINGS:
                raise ValueError(f"unknown encoding {name!r}{suggestion(name, list(ENCODINGS))}")
            if info.field_name == "attention" and not _ATTENTION.fullmatch(name):
                raise ValueError(
                    f"{name!r} is no type of the KV cache with the width of a head and how many share a key, such as "
                    "'f16@64/4'; probe again"
                )
            for kind in type(rate).model_fields:
                value = getattr(rate, kind)
                if not RATE_BOUNDS[0] <= value <= RATE_BOUNDS[1]:
                    low, high = RATE_BOUNDS
                    text = f"{value:g} is impossible for {kind} of {name}; it lies between {low:g} and {high:g}"
                    raise ValueError(text)
        return figure

    @field_validator("*")
    @classmethod
    def _possible(cls, figure: Figure[Any] | None, info: ValidationInfo) -> Figure[Any] | None:
        low, high = _POSSIBLE.get(info.field_name or "", (None, None))
        if figure is not None and low is not None and high is not None and not low <= figure.value <= high:
            raise ValueError(
                f"{figure.value:g} is impossible for {info.field_name}; it lies between {low:g} and {high:g}"
            )
        return figure


RATE_BOUNDS = (1e5, 1e16)
"""What a kernel may do in a second at all, in bytes or in operations."""
_ATTENTION = re.compile(r"(f16|q8_0|q4_0)@[1-9]\d{0,3}/[1-9]\d{0,2}")
_POSSIBLE = {
    "memory": (64 << 20, 64 << 40),
    "bandwidth": (10**8, 10**13),
    "storage": (10**5, 10**12),
    "arithmetic": (10**8, 10**16),
    "f32": (10**8, 10**16),
    "int8": (10**8, 10**16),
    "cache_l1d": (1 << 10, 64 << 20),
    "cache_l2": (16 << 10, 1 << 30),
    "cache_l3": (16 << 10, 8 << 30),
    "cache_kept": (1 << 10, 8 << 30),
    "cores": (1, 4096),
    "decode_efficiency": (0.001, 1),
    "elementwise": (10**5, 10**16),
    "block_overhead": (1e-9, 1),
}
"""What a figure may be at all: beyond that somebody mistook a unit."""


class Device(_Strict):
    """A machine that a bundle is made for."""

    name: str
    description: str = Field(min_length=1)
    """One line for `llmpack list devices`."""
    arch: Literal["x86_64", "aarch64", "riscv64"]
    cpu: str
    """Model of the processor, as the system names it where it was probed."""
    kernel: str = ""
    """Operating system and its version, where it was probed."""
    figures: Figures

    @property
    def memory(self) -> int:
        """Bytes of memory."""
        return self.figures.memory.value

    @property
    def cores(self) -> int | None:
        """Physical cores, if known."""
        return self.figures.cores.value if self.figures.cores else None

    @property
    def instruction_sets(self) -> frozenset[str] | None:
        """Instruction sets, if known."""
        return frozenset(self.figures.instruction_sets.value) if self.figures.instruction_sets else None

    @property
    def bandwidth(self) -> int | None:
        """Bytes per second from memory, if known."""
        return self.figures.bandwidth.value if self.figures.bandwidth else None

    @property
    def fingerprint(self) -> str:
        """Digest of what makes it this machine and not another: processor, cores, instruction sets, memory.

        Memory is counted in quarters of a GiB, because kernels reserve a little more or less of it.
        """
        facts = {
            "arch": self.arch,
            "cpu": self.cpu,
            "cores": self.cores,
            "instruction_sets": sorted(self.instruction_sets or ()),
            "memory": round(self.memory / (1 << 28)),
        }
        return sha256_value(facts)[:16]


def device_names() -> list[str]:
    """Names of all profiles in the package; "host" is not one of them."""
    folder = files("llmpack.target") / "devices"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def device(name: str, folder: Path = Path()) -> Device:
    """The device of that name, or of a profile's file (``name.toml``, from `folder`); "host" probes this machine.

    Raises RecipeError with a suggestion, or with everything that is wrong in the file.
    """
    if name == HOST:
        from llmpack.target.probe import probe_host

        return probe_host()
    if name.endswith(".toml"):
        path = folder / name
        try:
            return read_device(path.stem, path.read_text("utf-8"), name)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise RecipeError(
                [Problem(f"the profile {name} cannot be read: {reason}", path="target.device")]
            ) from error
    names = device_names()
    if name not in names:
        hint = suggestion(name, [HOST, *names])
        raise RecipeError([Problem(f"unknown device `{name}`{hint}", path="target.device")])
    return read_device(name, (files("llmpack.target") / "devices" / f"{name}.toml").read_text("utf-8"), f"{name}.toml")


def read_device(name: str, text: str, where: str) -> Device:
    """A device from the text of its profile. Raises RecipeError with every problem, `where` being the file's name."""
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # tomllib lets both out for numbers and nesting without end
        raise RecipeError([Problem(f"this is no TOML: {error}", where=where)]) from error
    try:
        return Device.model_validate({**table, "name": name})
    except ValidationError as error:
        raise RecipeError([_problem(e, where) for e in error.errors()]) from error


def _problem(detail: ErrorDetails, where: str) -> Problem:
    """What pydantic found, in words, with the nearest spelling of an unknown key."""
    path = ".".join(str(part) for part in detail["loc"])
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        name = str(detail["loc"][-1])
        known = {1: Device.model_fields, 2: Figures.model_fields}.get(len(detail["loc"]), Figure.model_fields)
        message = f"unknown key `{name}`{suggestion(name, list(known))}"
    return Problem(message, path=path, where=where)
