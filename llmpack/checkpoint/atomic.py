"""Files and folders that are either there, whole and on disk, or not there at all."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmpack.errors import EnvironmentProblem
from llmpack.units import format_size

TEMPORARY_SUFFIX = ".tmp"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_ALLOWED = {errno.EROFS, errno.EACCES, errno.EPERM}
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def temporary_name(path: Path) -> Path:
    """Where `path` is written before it is renamed: hidden, in the same folder, ending in ``.tmp``."""
    return path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")


def is_temporary(name: str) -> bool:
    """True for a name that `temporary_name` gives out, in this process or in one that was killed."""
    return name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)


@contextmanager
def disk_errors(folder: Path, nbytes: int, kept: str = "") -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into an `EnvironmentProblem` that says how much is missing.

    nbytes  what was about to be written under `folder`
    kept    one sentence on what a second run will find, "" for nothing
    """
    try:
        yield
    except OSError as error:
        tail = f"; {kept}" if kept else ""
        if error.errno in _NO_SPACE:
            free = shutil.disk_usage(folder).free
            raise EnvironmentProblem(
                f"{folder}: no room for {format_size(nbytes)} ({format_size(free)} free, or a quota is used up); "
                f"free some space and run the same command again{tail}"
            ) from error
        if error.errno in _NOT_ALLOWED:
            raise EnvironmentProblem(
                f"{error.filename or folder}: cannot be written ({error.strerror}); "
                f"choose a folder that you may write to{tail}"
            ) from error
        raise


def require_space(folder: Path, nbytes: int, kept: str = "") -> None:
    """Raise `EnvironmentProblem` now if `nbytes` will not fit on the disk of `folder`."""
    with disk_errors(folder, nbytes, kept):
        if shutil.disk_usage(folder).free < nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Make every file and every name under a folder durable. Links are not followed."""
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            if path.is_symlink():
                continue
            with path.open("rb") as file:
                os.fsync(file.fileno())
        fsync_folder(Path(root))


@contextmanager
def replaced_when_whole(path: Path) -> Iterator[Path]:
    """Hand out a temporary path; when the block ends well, fsync it and rename it to `path`.

    If the block raises, the temporary file is removed and `path` stays as it was.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one. Raises EnvironmentProblem on a full disk."""
    with disk_errors(path.parent, len(data)), replaced_when_whole(path) as temporary:
        temporary.write_bytes(data)


def copy_atomic(source: Path, path: Path) -> None:
    """`write_atomic` with the bytes of another file."""
    with disk_errors(path.parent, source.stat().st_size), replaced_when_whole(path) as temporary:
        shutil.copyfile(source, temporary)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step (renameat2, Linux 3.15). False where the system cannot do it."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def publish_folder(temporary: Path, final: Path) -> None:
    """Make `temporary` durable and let it appear as `final` by one rename.

    Both lie in the same folder. A folder that is already called `final` is swapped out in one step
    where the system can do that (Linux), by two renames elsewhere, and then removed.
    """
    fsync_tree(temporary)
    with disk_errors(final.parent, 0):
        if not final.exists():
            temporary.rename(final)
        elif _exchange(temporary, final):
            fsync_folder(final.parent)
            shutil.rmtree(temporary)
        else:
            aside = temporary_name(final)
            final.rename(aside)
            temporary.rename(final)
            fsync_folder(final.parent)
            shutil.rmtree(aside)
    fsync_folder(final.parent)
