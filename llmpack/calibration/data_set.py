"""Data sets as text: of the Hugging Face hub, at a commit, or a folder on disk, read by the library `datasets`.

    "dataset:OWNER/NAME@COMMIT/SPLIT#FIELD"          a data set of the hub; the commit has 40 hex digits
    "dataset:OWNER/NAME@COMMIT/CONFIG/SPLIT#FIELD"   one with several configurations
    "dataset:./FOLDER/SPLIT#FIELD"                   parquet, csv, arrow or jsonl files below a folder

A split may be a part of one, as `datasets` writes it: ``train[:2000]``. Data alone is read; the library has run no code
of repositories since its version 4.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmpack.errors import EnvironmentProblem

if TYPE_CHECKING:
    import datasets
else:
    from llmpack.lazy import LazyModule

    datasets = LazyModule("datasets", "data")

KIND = "dataset"
_HUB = re.compile(
    r"(?P<path>[\w.-]+/[\w.-]+)@(?P<revision>[0-9a-f]{40})(?:/(?P<name>[^/#]+))?/(?P<split>[^/#]+)#(?P<field>.+)"
)
_FOLDER = re.compile(r"(?P<path>[./~].*)/(?P<split>[^/#]+)#(?P<field>.+)")
FORMS = "write dataset:OWNER/NAME@COMMIT/SPLIT#FIELD (40 hex digits of a commit), or dataset:./FOLDER/SPLIT#FIELD"


def folder_of(source: str, base: Path) -> Path | None:
    """The folder that a source names, None for one of the hub. `source`: what stands behind ``dataset:``."""
    match = _FOLDER.fullmatch(source)
    return None if match is None else base / Path(match["path"]).expanduser()


def parse(source: str, base: Path) -> Mapping[str, str | None]:
    """The parts that a source names. Raises ValueError for what is no such source or a folder that is not there."""
    match = _HUB.fullmatch(source) or _FOLDER.fullmatch(source)
    if match is None:
        raise ValueError(FORMS)
    folder = folder_of(source, base)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    return match.groupdict()


def rows(source: str, base: Path, *, offline: bool) -> Iterator[str]:
    """The texts of a data set, in its order.

    source  what stands behind ``dataset:``
    base    where relative paths start

    Raises ValueError for what is no such source or gives no text, MissingExtra without `datasets`, EnvironmentProblem
    where the hub cannot be reached or must not be.
    """
    named = parse(source, base)
    folder = folder_of(source, base)
    if folder is None and offline and not os.environ.get("HF_HUB_OFFLINE"):
        raise EnvironmentProblem(
            f"dataset:{source}: the build is offline, and data sets of the hub are looked up there; "
            "set HF_HUB_OFFLINE=1 to read them from the cache of `datasets`"
        )
    path = named["path"] if folder is None else str(folder)
    try:
        found = datasets.load_dataset(path, named.get("name"), split=named["split"], revision=named.get("revision"))
    except OSError as error:
        raise EnvironmentProblem(f"dataset:{source} cannot be fetched ({type(error).__name__}: {error})") from error
    field = named["field"]
    if field not in found.column_names:
        raise ValueError(f"no column `{field}`; there are {', '.join(found.column_names)}")
    for value in found[field]:
        if not isinstance(value, str):
            raise ValueError(f"column `{field}` holds no text but {type(value).__name__}")
        yield value
