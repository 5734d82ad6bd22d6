"""A bundle: the folder that ships. Flat, checked by digests, and either there whole or not there.

model.gguf         the model; or, as transformers saves one:
  config.json, *.safetensors (with model.safetensors.index.json), tokenizer files
manifest.json      what it was made from and how, and what was measured
README.md          the model card
LICENSE, NOTICE    texts of the source, under their own names
recipe.toml        the recipe as it was given
recipe.lock.json   what its references stood for
SHA256SUMS         digest of every other file, in the form of coreutils: ``sha256sum -c SHA256SUMS``
"""

from __future__ import annotations

import re
import shutil
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmpack.checkpoint.atomic import copy_atomic, is_temporary, publish_folder, temporary_name, write_atomic
from llmpack.checkpoint.strict_json import parse_json
from llmpack.digest import sha256_file, sha256_value
from llmpack.errors import Problem, UsageError, VerificationFailed
from llmpack.progress import QUIET, Progress

MODEL = "model.gguf"
MANIFEST = "manifest.json"
CARD = "README.md"
RECIPE = "recipe.toml"
LOCK = "recipe.lock.json"
SUMS = "SHA256SUMS"
CONFIG = "config.json"
REQUIRED = (MODEL, MANIFEST, CARD, RECIPE, LOCK, SUMS)
"""What a bundle has; one of a model folder has CONFIG and weights in place of MODEL."""
MAX_SMALL_FILE = 64 << 20  # of the manifest and the list of digests

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_LINE = re.compile(r"(?P<digest>[0-9a-f]{64}) [ *](?P<name>[^\n]+)")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


BLOCK = 4096
"""Disks give space in blocks; nearly all file systems use this size."""


def disk_usage(sizes: Iterable[int]) -> int:
    """Bytes of disk that files of these sizes take, in whole blocks."""
    return sum(-(-size // BLOCK) * BLOCK for size in sizes)


def name_problem(name: str) -> str | None:
    """Why a file must not have that name in a bundle, or None: names must be plain on every system."""
    if not _NAME.fullmatch(name) or name.endswith("."):
        return f"{name!r} is not a plain file name (letters, digits, `.`, `_`, `-`; no folders)"
    return f"{name!r} is a device on some systems" if _RESERVED.fullmatch(name) else None


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose files are those that it lists.

    manifest  manifest.json
    digests   hex sha256 by file name, from SHA256SUMS
    """

    folder: Path
    manifest: Mapping[str, Any]
    digests: Mapping[str, str]

    @classmethod
    def open(cls, folder: Path, *, contents: bool = True, progress: Progress = QUIET) -> Bundle:
        """Open a folder that anybody may have made or changed.

        contents  compare the digest of every file; without it only names are compared, and the model may have been
                  changed without being noticed

        Raises VerificationFailed with every difference, UsageError if there is no such folder.
        """
        if not folder.is_dir():
            kind = "a bundle is a folder; unpack archives first" if folder.exists() else "there is no such folder"
            raise UsageError(f"{folder}: {kind}")
        messages = list(_entry_problems(folder))
        listed: dict[str, str] = {}
        if not messages:  # only plain files are opened
            listed, wrong = _listed(folder)
            messages += [*wrong, *_missing_or_more(folder, listed)]
            if contents:
                messages += _changed(folder, listed, progress)
        manifest: Any = None
        if not messages:
            manifest, wrong = _manifest(folder)
            messages += wrong
        if messages:
            raise VerificationFailed([Problem(message, where=str(folder)) for message in messages])
        return cls(folder, MappingProxyType(manifest), MappingProxyType(listed))

    @property
    def model(self) -> Path:
        """The GGUF file, or the folder itself where it holds a model as transformers saves one."""
        return self.folder / MODEL if MODEL in self.digests else self.folder

    @property
    def nbytes(self) -> int:
        """Bytes of all files, which is what the disk budget counts."""
        return sum(path.stat().st_size for path in self.folder.iterdir())


def _entry_problems(folder: Path) -> Iterator[str]:
    """What lies in the folder and must not: looked at by name and kind, not opened."""
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        problem = name_problem(name)
        if problem:
            yield problem
        elif not stat.S_ISREG((folder / name).lstat().st_mode):
            yield f"{name} is not a plain file (a link, a folder or a device)"
    yield from _colliding(names)


def _colliding(names: Iterable[str]) -> Iterator[str]:
    for lower, count in Counter(name.lower() for name in names).items():
        if count > 1:
            yield f"{count} files are called {lower!r} where case does not count"


def _listed(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Digest by name, and what is wrong with the list itself."""
    path = folder / SUMS
    if not path.is_file():
        return {}, []
    if path.stat().st_size > MAX_SMALL_FILE:
        return {}, [f"{SUMS} has {path.stat().st_size} bytes, more than a list of digests can have"]
    listed: dict[str, str] = {}
    problems = []
    for number, line in enumerate(path.read_bytes().decode("utf-8", "replace").splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if match is None:
            problems.append(f"{SUMS} line {number} is not a digest and a name")
            continue
        name = match["name"]
        problem = name_problem(name) or (f"{name!r} is listed twice" if name in listed else None)
        if problem:
            problems.append(f"{SUMS} line {number}: {problem}")
        listed[name] = match["digest"]
    return listed, problems + [f"{SUMS}: {problem}" for problem in _colliding(listed)]


def _missing_or_more(folder: Path, listed: Mapping[str, str]) -> Iterator[str]:
    present = {path.name for path in folder.iterdir()}
    needed = [name for name in REQUIRED if name != MODEL or CONFIG not in present]
    for name in needed:
        if name not in present:
            yield f"{name} is missing; a bundle has it"
    for name in sorted(listed.keys() - present - set(needed)):
        yield f"{name} is listed in {SUMS} and missing"
    for name in sorted(present - listed.keys() - {SUMS}):
        yield f"{name} is not listed in {SUMS}"
    if SUMS in listed:
        yield f"{SUMS} lists itself"


def _changed(folder: Path, listed: Mapping[str, str], progress: Progress) -> Iterator[str]:
    present = [name for name in sorted(listed) if (folder / name).is_file()]
    with progress.task("checking digests", float(sum((folder / name).stat().st_size for name in present))) as done:
        for name in present:
            digest = sha256_file(folder / name)
            if digest != listed[name]:
                yield f"{name} was changed: its sha256 is {digest}, {SUMS} says {listed[name]}"
            done((folder / name).stat().st_size)


def _manifest(folder: Path) -> tuple[Any, list[str]]:
    path = folder / MANIFEST
    if path.stat().st_size > MAX_SMALL_FILE:
        return None, [f"{MANIFEST} has {path.stat().st_size} bytes, more than is believed"]
    try:
        manifest = parse_json(path.read_bytes())
    except ValueError as fault:
        return None, [f"{MANIFEST}: {fault}"]
    return (manifest, []) if isinstance(manifest, dict) else (None, [f"{MANIFEST} holds no JSON object"])


def model_digest(digests: Mapping[str, str]) -> str:
    """What stands for a model: the digest of its one file, or of the digests of its files by name."""
    return next(iter(digests.values())) if len(digests) == 1 else sha256_value(dict(digests))


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS over every other file of a folder, sorted by name.

    Raises VerificationFailed for files that a bundle cannot hold.
    """
    problems = list(_entry_problems(folder))
    if problems:
        raise VerificationFailed([Problem(problem, where=str(folder)) for problem in problems])
    names = sorted(path.name for path in folder.iterdir() if path.name != SUMS)
    lines = [f"{sha256_file(folder / name)}  {name}\n" for name in names]
    write_atomic(folder / SUMS, "".join(lines).encode())


def copy_licences(files: Sequence[Path], folder: Path) -> list[str]:
    """Copy licence texts into a bundle; the names that they get, which are their own, made plain."""
    names: list[str] = []
    for file in files:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", file.name).strip("._") or "LICENSE"
        taken = {name.lower() for name in (*names, *REQUIRED)}
        name, number = plain, 2
        while name.lower() in taken:
            name, number = f"{plain}.{number}", number + 1
        copy_atomic(file, folder / name)
        names.append(name)
    return names


def begin_bundle(final: Path) -> Path:
    """An empty folder beside `final` in which a bundle is put together; what killed builds left there is removed.

    The caller holds the lock of `final`. Raises UsageError if `final` exists and is no bundle.
    """
    _require_replaceable(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    for entry in final.parent.iterdir():
        if is_temporary(entry.name) and entry.name.startswith(f".{final.name}.") and not entry.is_symlink():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    temporary = temporary_name(final)
    temporary.mkdir()
    return temporary


def publish_bundle(temporary: Path, final: Path) -> Bundle:
    """Seal a finished folder with its digests and let it appear as `final` by one rename.

    An older bundle of that name stays until this one is on disk. Raises VerificationFailed if the folder is no
    bundle, UsageError if `final` is something else than a bundle.
    """
    write_sums(temporary)
    Bundle.open(temporary, contents=False)
    _require_replaceable(final)
    publish_folder(temporary, final)
    return Bundle.open(final, contents=False)


def _require_replaceable(final: Path) -> None:
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        raise UsageError(f"{final} is a file or a link, not a bundle; choose another place with --out")
    if final.is_dir() and any(final.iterdir()) and not all((final / name).is_file() for name in (MANIFEST, SUMS)):
        raise UsageError(
            f"{final} has files in it and is no bundle ({MANIFEST} and {SUMS} are not both there), so it is not "
            "replaced; choose another place with --out, or move it away"
        )
