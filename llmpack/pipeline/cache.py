"""Work that is done is kept, found again by what went into it, and continued where it was killed.

An entry is a folder named by the sha256 of its facts::

    <root>/<kind>/<key>/content/     what was made; grows while it is being made
    <root>/<kind>/<key>/work/        scratch of unfinished work, gone once it is whole
    <root>/<kind>/<key>/entry.json   written last: facts, result, and every file with its digest

Without ``entry.json`` an entry is unfinished and whoever claims it next goes on in its folder. Only one
process at a time holds an entry; an operating system lock does not outlive its holder, so a killed
build leaves no stale one. Files are checked by size and time when an entry is used, and by digest where
these differ from what was recorded; a damaged entry is made again.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpack.checkpoint.atomic import write_atomic
from llmpack.digest import sha256_file, sha256_value
from llmpack.errors import Busy, UsageError
from llmpack.progress import QUIET, Progress

FORMAT = 1
MARKER = "entry.json"
DAY = 86_400


def default_root() -> Path:
    """``$LLMPACK_CACHE``, else ``$XDG_CACHE_HOME/llmpack``, else ``~/.cache/llmpack``."""
    named = os.environ.get("LLMPACK_CACHE")
    if named:
        return Path(named).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "llmpack"


@dataclass(frozen=True)
class Entry:
    """One finished piece of work.

    facts   everything that its key was computed from
    result  what its maker wanted remembered beside the files (JSON values)
    """

    kind: str
    key: str
    folder: Path
    facts: Mapping[str, Any]
    result: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]

    @property
    def content(self) -> Path:
        """The folder of what was made."""
        return self.folder / "content"

    @property
    def nbytes(self) -> int:
        """Bytes of the files."""
        return sum(int(file["bytes"]) for file in self.files.values())

    def damage(self, *, thorough: bool = False) -> str | None:
        """What is wrong with the files, or None. `thorough` computes every digest again."""
        for name, facts in self.files.items():
            path = self.content / name
            try:
                status = path.stat()
            except OSError:
                return f"{name} is missing"
            if status.st_size != facts["bytes"]:
                return f"{name} has {status.st_size} bytes, not {facts['bytes']}"
            changed = status.st_mtime_ns != facts["mtime_ns"]
            if (thorough or changed) and sha256_file(path) != facts["sha256"]:
                return f"{name} has changed since it was written"
        return None


@dataclass(frozen=True)
class Slot:
    """An entry that this process holds: either whole (`entry`), or to be made in `content` and then finished."""

    kind: str
    key: str
    folder: Path
    facts: Mapping[str, Any]
    entry: Entry | None

    @property
    def content(self) -> Path:
        """Where the work is to be made; may hold what a killed process left."""
        return self.folder / "content"

    @property
    def work(self) -> Path:
        """Scratch that survives a killed process and is removed once the work is whole."""
        return self.folder / "work"

    def finish(self, result: Mapping[str, Any]) -> Entry:
        """Declare the content whole and write the marker, last."""
        files = {}
        for path in sorted(self.content.rglob("*")):
            if path.is_file():
                status = path.stat()
                files[path.relative_to(self.content).as_posix()] = {
                    "bytes": status.st_size,
                    "mtime_ns": status.st_mtime_ns,
                    "sha256": sha256_file(path),
                }
        marker = {
            "format": FORMAT,
            "kind": self.kind,
            "key": self.key,
            "facts": self.facts,
            "result": result,
            "files": files,
        }
        write_atomic(self.folder / MARKER, (json.dumps(marker, indent=1) + "\n").encode())
        if self.work.exists():
            shutil.rmtree(self.work)
        return Entry(self.kind, self.key, self.folder, self.facts, dict(result), files)


class Cache:
    """The folder of all entries.

    wait  wait for another process that holds an entry (and say so); else raise Busy
    """

    def __init__(self, root: Path, *, wait: bool = True, progress: Progress = QUIET) -> None:
        self.root = root
        self.wait = wait
        self.progress = progress

    @staticmethod
    def key(kind: str, facts: Mapping[str, Any]) -> str:
        """sha256 of the canonical JSON of the facts."""
        return sha256_value({"format": FORMAT, "kind": kind, "facts": facts})

    def folder(self, kind: str, key: str) -> Path:
        """Where an entry lives."""
        return self.root / kind / key

    def find(self, kind: str, facts: Mapping[str, Any]) -> Entry | None:
        """The whole and undamaged entry with these facts, or None. Takes no lock and changes nothing."""
        entry, _ = _read(self.folder(kind, self.key(kind, facts)), kind)
        return entry if entry is not None and entry.damage() is None else None

    def unfinished(self, kind: str, facts: Mapping[str, Any]) -> bool:
        """Whether a killed process left work to go on with."""
        folder = self.folder(kind, self.key(kind, facts))
        return (folder / "content").exists() and not (folder / MARKER).exists()

    @contextmanager
    def claim(self, kind: str, facts: Mapping[str, Any], what: str) -> Iterator[Slot]:
        """Hold the entry with these facts; `what` names it to a person. Raises Busy.

        A damaged entry is emptied first, with a word about it.
        """
        key = self.key(kind, facts)
        folder = self.folder(kind, key)
        with self.lock(f"{kind}-{key}", what):
            entry, trouble = _read(folder, kind)
            if entry is not None:
                trouble = entry.damage()
            if trouble is not None:
                self.progress.say(f"cached {what} is damaged ({trouble}); it is made again")
                shutil.rmtree(folder)
                entry = None
            folder.mkdir(parents=True, exist_ok=True)
            if entry is not None:
                os.utime(folder)
            yield Slot(kind, key, folder, facts, entry)

    def remember(self, kind: str, facts: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Keep a result that has no files; one that is there already is replaced."""
        with self.claim(kind, facts, f"{kind} {facts.get('name', '')}".strip()) as slot:
            slot.finish(result)

    @contextmanager
    def lock(self, name: str, what: str) -> Iterator[None]:
        """One process at a time. Raises Busy, or waits and says for whom."""
        from filelock import FileLock, Timeout  # not before it is needed: a plan locks nothing

        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")
        owner = folder / f"{name}.pid"
        try:
            lock.acquire(blocking=False)
        except Timeout as busy:
            pid = _text(owner) or "another process"
            message = f"{what} is being worked on by process {pid}"
            if not self.wait:
                raise Busy(message) from busy
            self.progress.say(f"{message}; waiting for it")
            lock.acquire()
        try:
            owner.write_text(str(os.getpid()))
            yield
        finally:
            owner.unlink(missing_ok=True)
            lock.release()

    def entries(self) -> Iterator[tuple[str, str, Path, Entry | None, str | None]]:
        """Every entry: kind, key, folder, the entry if it is whole, and what is wrong with its marker."""
        for kind in sorted(path for path in self._kinds()):
            for folder in sorted(path for path in (self.root / kind).iterdir() if path.is_dir()):
                entry, trouble = _read(folder, kind)
                yield kind, folder.name, folder, entry, trouble

    def _kinds(self) -> list[str]:
        if not self.root.is_dir():
            return []
        return [path.name for path in self.root.iterdir() if path.is_dir() and path.name != "locks"]

    def remove(self, prefix: str) -> list[str]:
        """Remove entries whose key starts with `prefix`. Raises UsageError if there are none, Busy if one is held."""
        found = [(kind, key, folder) for kind, key, folder, _, _ in self.entries() if key.startswith(prefix)]
        if not found:
            raise UsageError(f"no cache entry starts with `{prefix}`; see llmpack cache ls")
        for kind, key, folder in found:
            with Cache(self.root, wait=False).lock(f"{kind}-{key}", f"cache entry {key[:12]}"):
                shutil.rmtree(folder)
        return [key for _, key, _ in found]

    def collect(self, days: float) -> list[tuple[str, str, int]]:
        """Remove what was not used for that many days and is not held: kind, key and bytes of each."""
        gone = []
        for kind, key, folder, _, _ in list(self.entries()):
            if time.time() - folder.stat().st_mtime < days * DAY:
                continue
            try:
                with Cache(self.root, wait=False).lock(f"{kind}-{key}", key):
                    gone.append((kind, key, folder_bytes(folder)))
                    shutil.rmtree(folder)
            except Busy:
                continue
        return gone


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _read(folder: Path, kind: str) -> tuple[Entry | None, str | None]:
    """The entry of a folder and what is wrong with its marker; (None, None) for an unfinished one."""
    try:
        data = json.loads((folder / MARKER).read_bytes())
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError) as error:
        return None, f"its {MARKER} cannot be read: {error}"
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        return None, "it was made by another version of llmpack"
    wanted = {"kind": str, "key": str, "facts": dict, "result": dict, "files": dict}
    if any(not isinstance(data.get(name), kind_) for name, kind_ in wanted.items()):
        return None, f"its {MARKER} is incomplete"
    if data["key"] != folder.name or data["kind"] != kind or Cache.key(kind, data["facts"]) != folder.name:
        return None, f"its {MARKER} belongs to another entry"
    return Entry(kind, data["key"], folder, data["facts"], data["result"], data["files"]), None
