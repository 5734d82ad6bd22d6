"""Recognise what often lies in place of a weight file: a Git LFS pointer, a web page, nothing, a broken download."""

from __future__ import annotations

from pathlib import Path

_LFS = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype html", b"<html", b"<?xml", b"<head")


def stand_in(path: Path, head: bytes, size: int) -> str | None:
    """Why the file holds no weights and how to get them, or None if it may hold some.

    head  the first bytes of the file (64 are enough), size  its length in bytes
    """
    if path.name.endswith(".incomplete"):
        return "a download that was broken off; delete it and download the file again"
    if size == 0:
        return "an empty file; download or copy it again"
    if head.startswith(_LFS):
        return f"a Git LFS pointer ({size} bytes) instead of the file; run `git lfs pull` in its repository"
    if head.lstrip().lower().startswith(_PAGES):
        return (
            "a web page (an error or login page saved as a file); download the file again, with a token if it is gated"
        )
    if head.lstrip().lower().startswith((b'{"error"', b'{"message"')):
        return "an error message of a server saved as a file; download the file again"
    return None
