"""What a source says about its licence: gathered, not judged."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpack.checkpoint.folder_intake import file_problem
from llmpack.checkpoint.gguf_metadata_reader import Strings

CARD = "README.md"
MAX_CARD = 4 << 20
MAX_TEXT = 1 << 20
LICENCE_FILE = re.compile(
    r"(LICEN[CS]E|NOTICE|COPYING|COPYRIGHT|USE[_-]POLICY|ACCEPTABLE[_-]USE)[\w .-]*", re.IGNORECASE
)
_CARD_LINE = re.compile(r"(?P<key>[A-Za-z_]\w*)\s*:(?:\s+(?P<value>.*))?")
_ITEM = re.compile(r"\s*-\s+(?P<value>.+)")
_CARD_KEYS = ("license", "license_name", "license_link", "base_model")


@dataclass(frozen=True)
class LicenceFact:
    """One statement: where it was made, the identifier, and name and link if the identifier is not a common one."""

    origin: str
    id: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class Licence:
    """All statements about one source, the texts that travel with it, and the models it says it comes from."""

    facts: tuple[LicenceFact, ...] = ()
    files: tuple[Path, ...] = ()
    base_models: tuple[str, ...] = ()

    def __add__(self, other: Licence) -> Licence:
        return Licence(self.facts + other.facts, self.files + other.files, self.base_models + other.base_models)


def folder_licence(folder: Path) -> Licence:
    """From the front matter of README.md and from licence files at the top of the folder."""
    files = [path for path in sorted(folder.iterdir()) if LICENCE_FILE.fullmatch(path.name)]
    files = [path for path in files if file_problem(folder, path, MAX_TEXT) is None]
    card = folder / CARD
    if not card.exists() or file_problem(folder, card, MAX_CARD) is not None:
        return Licence(files=tuple(files))
    front = _front_matter(card.read_text(encoding="utf-8", errors="replace"))
    names, links = front.get("license_name", [None]), front.get("license_link", [None])
    facts = tuple(LicenceFact(CARD, each, names[0], links[0]) for each in front.get("license", []))
    return Licence(facts, tuple(files), tuple(front.get("base_model", [])))


def gguf_licence(metadata: Mapping[str, Any]) -> Licence:
    """From the `general.license*` and `general.base_model.*` keys of a GGUF file."""
    texts = {key: value for key, value in metadata.items() if isinstance(value, str) and key.startswith("general.")}
    name, link = texts.get("general.license.name"), texts.get("general.license.link")
    stated = metadata.get("general.license")
    ids = list(stated) if isinstance(stated, Strings) else [stated] if isinstance(stated, str) else []
    facts = tuple(LicenceFact("general.license", each, name, link) for each in ids)
    repositories = [texts[key] for key in sorted(texts) if re.fullmatch(r"general\.base_model\.\d+\.repo_url", key)]
    return Licence(facts, base_models=tuple(repositories))


def _front_matter(text: str) -> dict[str, list[str]]:
    """The few keys that matter of the YAML between the first two ``---`` lines; plain values and plain lists only.

    A full YAML reader is left out on purpose: the text is a stranger's, and nothing else in it is of use.
    """
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in _front_lines(text):
        if (item := _ITEM.fullmatch(line)) and current is not None:
            current.append(_scalar(item["value"]))
        elif (match := _CARD_LINE.fullmatch(line)) and match["key"] in _CARD_KEYS:
            current = found.setdefault(match["key"], [])
            current += _values(match["value"] or "")
        elif line.strip():
            current = None
    return {key: [v for v in values if v] for key, values in found.items() if any(values)}


def _front_lines(text: str) -> Iterator[str]:
    lines = iter(text.removeprefix("\ufeff").splitlines())
    if next(lines, "").strip() != "---":
        return
    for line in lines:
        if line.strip() == "---":
            return
        yield line.rstrip()


def _values(text: str) -> list[str]:
    inner = text.strip()
    if inner.startswith("[") and inner.endswith("]"):
        return [_scalar(part) for part in inner[1:-1].split(",")]
    return [_scalar(inner)] if inner else []


def _scalar(text: str) -> str:
    plain = text.strip()
    if plain[:1] in ("'", '"') and (end := plain.find(plain[0], 1)) > 0:
        return plain[1:end]
    return plain.split(" #", 1)[0].strip()
