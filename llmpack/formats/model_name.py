"""What the name of a model says: ``org/Base-7B-Instruct-v0.2`` is base name, size, fine-tune and version.

GGUF has a key for each of these, and no other source for most of them than the name. The rules are
those of llama.cpp's converter (gguf-py/gguf/metadata.py at https://github.com/ggml-org/llama.cpp),
so that a model is called the same whoever converts it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_VERSION = re.compile(r"(v|iter)?\d+([.]\d+)*", re.IGNORECASE)
_TYPE = re.compile(r"i?q\d(_\w)*|b?fp?(16|32)", re.IGNORECASE)
_SIZE = re.compile(r"(([A]|\d+[x])?\d+([._]\d+)?[KMBT][\d]?|small|mini|medium|large|x?xl)", re.IGNORECASE)
_TUNE = re.compile(r"chat|instruct|vision|lora", re.IGNORECASE)
_NOT_TITLED = re.compile(r"v\d+(\.\d+)*|\d.*")
_SCALES = " KMBT"


@dataclass(frozen=True)
class NameParts:
    """The parts of a model's name; None where it has none.

    full  the name without the organization
    """

    full: str
    organization: str | None = None
    basename: str | None = None
    finetune: str | None = None
    version: str | None = None
    size_label: str | None = None


def title(name: str) -> str:
    """``smol-model-v2`` as ``Smol Model v2``: words capitalized, unless they are acronyms or versions."""
    words = name.strip().replace("-", " ").split()
    return " ".join(w.title() if w.islower() and not _NOT_TITLED.fullmatch(w) else w for w in words)


def size_label(parameters: int) -> str:
    """``135M``, ``1.2B``: a count of parameters, two digits or more."""
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters > scale or letter == "K":
            break
    scaled = parameters * {"T": 1e-12, "B": 1e-9, "M": 1e-6, "K": 1e-3}[letter]
    decimals = max(2 - len(str(round(scaled)).lstrip("0")), 0)
    return f"{scaled:.{decimals}f}{letter}"


def name_parts(model: str, parameters: int) -> NameParts:
    """Read a model's name.

    model       ``org/name``, or a name alone
    parameters  how many the model has; a size in the name that is far from it is read as a context length
    """
    if " " in model:
        return NameParts(model)
    organization, slash, full = model.partition("/")
    if not slash:
        organization, full = "", model
    parts = [part for part in full.split("-") if part]
    kinds: list[set[str]] = []
    for index, part in enumerate(parts):
        parts[index], kind = _classified(part, index, parameters)
        kinds.append(kind)
    _drop_word_sizes(parts, kinds)
    _mark_basename(parts, kinds)
    found = {kind: [p for p, k in zip(parts, kinds, strict=True) if kind in k] for kind in ("size", "tune", "base")}
    versions = [p for p, k in zip(parts, kinds, strict=True) if "version" in k and "base" not in k]
    named = bool(found["size"] or found["tune"] or versions)  # a bare name is too ambiguous to be a base name
    return NameParts(
        full,
        None if organization.startswith(".") else organization or None,
        "-".join(found["base"]) or None if named else None,
        "-".join(found["tune"]) or None,
        "-".join(versions) or None,
        "-".join(dict.fromkeys(found["size"])) or None,
    )


def _classified(part: str, index: int, parameters: int) -> tuple[str, set[str]]:
    if _VERSION.fullmatch(part):
        return part, {"version"}
    if _TYPE.fullmatch(part):
        return part.upper(), {"type"}
    if index > 0 and _SIZE.fullmatch(part):
        return _size(part, parameters)
    if index > 0 and _TUNE.fullmatch(part):
        return part, {"tune"}
    return part, set()


def _size(part: str, parameters: int) -> tuple[str, set[str]]:
    part = part.replace("_", ".")
    if part[-1].isdecimal():  # "7b1" means 7.1B
        part = f"{part[:-2]}.{part[-1]}{part[-2]}"
    if len(part) > 1 and part[-2].isdecimal() and part[-1] in "kmbt":
        part = part[:-1] + part[-1].upper()
    try:
        count = float(part[:-1]) * 1000.0 ** _SCALES.find(part[-1])
    except ValueError:
        return part, {"size"}  # a word, or experts times size
    if parameters and abs(count - parameters) > 7 * parameters // 8:
        return part[:-1] + part[-1].lower(), {"tune"}
    return part, {"size"}


def _drop_word_sizes(parts: list[str], kinds: list[set[str]]) -> None:
    """ "small" says nothing beside "135M"."""
    sizes = [part for part, kind in zip(parts, kinds, strict=True) if "size" in kind]
    if any(c.isdecimal() for part in sizes for c in part):
        for part, kind in zip(parts, kinds, strict=True):
            if "size" in kind and part.isalpha():
                kind.remove("size")


def _mark_basename(parts: list[str], kinds: list[set[str]]) -> None:
    """The base name is what stands first, until something with another meaning; the rest is fine-tune."""
    at_start = True
    for part, kind in zip(parts, kinds, strict=True):
        if at_start and ((not kind and part[0].isalpha()) or "version" in kind):
            kind.add("base")
        else:
            at_start = False
            if not kind:
                kind.add("tune")
    for kind in reversed(kinds):
        if "base" not in kind or len(kind) == 1:
            break
        kind.remove("base")
