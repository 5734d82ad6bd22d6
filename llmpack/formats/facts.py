"""Facts about a model that are not in its tensors: name, origin, licence. They travel inside the bundle.

They come from the front matter of the source's model card, its generation config and its name, or
from the ``general.*`` keys of a GGUF source, and are read by the rules of llama.cpp's converter
(gguf-py/gguf/metadata.py at https://github.com/ggml-org/llama.cpp). One difference: the name of a
folder counts only if the caller says so, because a folder in a cache is called after its content.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmpack.checkpoint.folder_intake import file_problem
from llmpack.checkpoint.strict_json import parse_json
from llmpack.errors import InputRejected, Problem
from llmpack.formats.model_card import front_matter
from llmpack.formats.model_name import NameParts, name_parts, title

HUB = "https://huggingface.co/"
MAX_TABLE = 1 << 20
_HUB_MODEL = re.compile(r"https?://huggingface\.co/([^/]+/[^/]+)")
_URL = re.compile(r"(https?|ssh)://")

# Field of Facts: keys of a model card that give it, in order of preference.
CARD_KEYS = {
    "name": ("name", "model_name"),
    "author": ("author", "model_author", "model_creator"),
    "version": ("version", "model_version"),
    "organization": ("organization", "model_organization"),
    "description": ("description", "model_description"),
    "finetune": ("finetune", "model_finetune"),
    "basename": ("basename", "model_basename", "model_type"),
    "size_label": ("size_label", "model_size_label"),
    "license": ("license",),
    "license_name": ("license_name",),
    "license_link": ("license_link",),
    "source_url": ("url", "model_url"),
    "source_doi": ("doi", "model_doi"),
    "source_uuid": ("uuid", "model_uuid"),
    "source_repo_url": ("repo_url", "model_repo_url"),
}
# Key below general.sampling: the name in generation_config.json, and whether it is a whole number.
SAMPLING = {
    "sequence": ("sequence", str),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "xtc_probability": ("xtc_probability", float),
    "xtc_threshold": ("xtc_threshold", float),
    "temp": ("temperature", float),
    "penalty_last_n": ("penalty_last_n", int),
    "penalty_repeat": ("penalty_repeat", float),
    "mirostat": ("mirostat", int),
    "mirostat_tau": ("mirostat_tau", float),
    "mirostat_eta": ("mirostat_eta", float),
}
RELATED = ("name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url")


@dataclass(frozen=True)
class Facts:
    """What a GGUF file says about its model, apart from numbers. None or empty: nothing is said.

    size_label   "135M"; where None, the writer counts parameters
    base_models  the models that this one was made from, each with keys of `RELATED`
    datasets     what it was trained on, likewise
    sampling     settings that the makers recommend, with keys of `SAMPLING`
    source_*     where the original is published
    """

    name: str
    author: str | None = None
    version: str | None = None
    organization: str | None = None
    finetune: str | None = None
    basename: str | None = None
    description: str | None = None
    quantized_by: str | None = None
    size_label: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    url: str | None = None
    doi: str | None = None
    uuid: str | None = None
    repo_url: str | None = None
    source_url: str | None = None
    source_doi: str | None = None
    source_uuid: str | None = None
    source_repo_url: str | None = None
    base_models: tuple[Mapping[str, str], ...] | None = None
    datasets: tuple[Mapping[str, str], ...] | None = None
    tags: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    sampling: Mapping[str, int | float | str] = field(default_factory=dict)

    @classmethod
    def of_folder(cls, folder: Path, model: str, parameters: int) -> Facts:
        """Facts of a checkpoint folder.

        model       what the model is called, ``org/name`` or a name; used where the files do not say
        parameters  how many it has, to tell sizes from context lengths in names

        Raises InputRejected (rules ``model-card`` and ``generation-config``) for files that do not parse.
        """
        card = front_matter(folder)
        found: dict[str, Any] = {}
        for fact, keys in CARD_KEYS.items():
            values = [value for key in keys if (value := _text(card.get(key)))]
            if values:
                found[fact] = values[0]
        config = _table(folder, "config.json", "config-json")
        said = config.get("_name_or_path")
        names = [said] if isinstance(said, str) and said.count("/") <= 1 else []
        for parts in (name_parts(name, parameters) for name in (*names, model)):
            for fact, value in _named_facts(parts):
                found.setdefault(fact, value)
        return cls(
            **found,
            base_models=_related(card, ("base_model", "base_models", "base_model_sources"), parameters),
            datasets=_related(card, ("datasets", "dataset", "dataset_sources"), parameters),
            tags=(*_texts(card.get("tags")), *_texts(card.get("pipeline_tag"))),
            languages=(*_texts(card.get("languages")), *_texts(card.get("language"))),
            sampling=_sampling(folder),
        )

    @classmethod
    def of_gguf(cls, metadata: Mapping[str, Any], name: str) -> Facts:
        """Facts of a GGUF file, from its ``general.*`` keys; `name` is used where it gives none."""
        general = {key.removeprefix("general."): value for key, value in metadata.items() if key.startswith("general.")}
        found = {fact: str(general[key]) for fact, key in general_keys().items() if general.get(key)}
        sampling = {key: general[f"sampling.{key}"] for key in SAMPLING if f"sampling.{key}" in general}
        return cls(
            **{"name": name, **found},
            base_models=_counted(general, "base_model"),
            datasets=_counted(general, "dataset"),
            tags=tuple(general.get("tags", ())),
            languages=tuple(general.get("languages", ())),
            sampling=sampling,
        )


def general_keys() -> dict[str, str]:
    """Field of Facts to its key below ``general.``, in file order."""
    plain = ("name", "author", "version", "organization", "finetune", "basename", "description", "quantized_by")
    keys = {fact: fact for fact in (*plain, "size_label", "license")}
    keys |= {"license_name": "license.name", "license_link": "license.link"}
    keys |= {fact: fact for fact in ("url", "doi", "uuid", "repo_url")}
    return keys | {f"source_{fact}": f"source.{fact}" for fact in ("url", "doi", "uuid", "repo_url")}


def _named_facts(parts: NameParts) -> Iterable[tuple[str, str]]:
    facts = {
        "name": title(parts.full),
        "organization": title(parts.organization) if parts.organization else None,
        "basename": parts.basename,
        "finetune": parts.finetune,
        "version": parts.version,
        "size_label": parts.size_label,
    }
    return ((fact, value) for fact, value in facts.items() if value)


def _text(value: Any) -> str | None:
    if isinstance(value, list):
        return ",".join(str(item) for item in value) or None
    return str(value) if value and not isinstance(value, Mapping) else None


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(str(item) for item in (value if isinstance(value, list) else [value]) if item)


def _related(card: Mapping[str, Any], keys: Iterable[str], parameters: int) -> tuple[Mapping[str, str], ...] | None:
    """Models or data sets that a card names by id, by address, or by a table of facts."""
    present = [card[key] for key in keys if key in card]
    if not present:
        return None
    entries = present[0] if isinstance(present[0], list) else [present[0]] if present[0] else []
    found = []
    for entry in entries:
        if isinstance(entry, Mapping):
            found.append({key: str(entry[key]) for key in RELATED if entry.get(key)})
        else:
            found.append(_named_model(str(entry), parameters))
    return tuple(found)


def _named_model(text: str, parameters: int) -> dict[str, str]:
    model, facts = text, {}
    if _URL.match(text):
        facts["repo_url"] = text
        on_hub = _HUB_MODEL.fullmatch(text)
        if on_hub is None:
            return facts
        model = on_hub[1]
    parts = name_parts(model, parameters)
    facts["name"] = title(parts.full)
    if parts.organization:
        facts["organization"] = title(parts.organization)
        facts.setdefault("repo_url", f"{HUB}{parts.organization}/{parts.full}")
    return facts | ({"version": parts.version} if parts.version else {})


def _counted(general: Mapping[str, Any], kind: str) -> tuple[Mapping[str, str], ...] | None:
    count = general.get(f"{kind}.count")
    if not isinstance(count, int):
        return None
    numbers = range(min(count, len(general)))  # a count that the file does not fill is not believed
    return tuple({k: str(general[f"{kind}.{i}.{k}"]) for k in RELATED if f"{kind}.{i}.{k}" in general} for i in numbers)


def _table(folder: Path, name: str, rule: str) -> dict[str, Any]:
    """A file of JSON; empty where there is none."""
    path = folder / name
    if not path.exists():
        return {}
    problem = file_problem(folder, path, MAX_TABLE)
    if problem is not None:
        raise InputRejected([problem])
    try:
        parsed = parse_json(path.read_bytes())
    except ValueError as fault:
        raise InputRejected([Problem(str(fault), where=str(path), rule=rule)]) from fault
    return parsed if isinstance(parsed, dict) else {}


def _sampling(folder: Path) -> dict[str, int | float | str]:
    config = _table(folder, "generation_config.json", "generation-config")
    found: dict[str, int | float | str] = {}
    for key, (theirs, kind) in SAMPLING.items():
        value = config.get(theirs)
        if value is None:
            continue
        whole = isinstance(value, int | float) and not isinstance(value, bool) and value == int(value)
        if kind is int and whole:
            found[key] = int(value)
        elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            found[key] = float(value)
        elif kind is str and isinstance(value, str):
            found[key] = value
        else:
            message = f"{theirs} = {value!r} is not of type {kind.__name__}; correct or delete it"
            where = str(folder / "generation_config.json")
            raise InputRejected([Problem(message, path=theirs, where=where, rule="generation-config")])
    return found
