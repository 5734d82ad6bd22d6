"""Which files of a checkpoint folder are opened at all, and which weight files make up the model.

Rules: ``index-path``, ``index-mismatch``, ``symlink-escape``, ``not-weights``, ``pickle-weights``,
``remote-code``, ``file-size``. Nothing outside the list of names below is ever opened.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpack.checkpoint.strict_json import parse_json
from llmpack.errors import InputRejected, Problem

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MIB = 1 << 20

# Files that travel with a model beside its weights, and the largest size that is believed.
TOKENIZER_FILES = {
    "added_tokens.json": 4 * MIB,
    "chat_template.jinja": 64 << 10,
    "chat_template.json": 1 * MIB,
    "generation_config.json": 1 * MIB,
    "merges.txt": 64 * MIB,
    "special_tokens_map.json": 1 * MIB,
    "tokenizer.json": 128 * MIB,
    "tokenizer.model": 32 * MIB,
    "tokenizer_config.json": 16 * MIB,
    "vocab.json": 64 * MIB,
}
MAX_INDEX = 64 * MIB
# The format in which Mistral publishes the same weights once more, beside the shards of the index.
DUPLICATE_WEIGHTS = re.compile(r"consolidated([.-][\w-]+)?\.safetensors")
_SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".onnx")
_NOT_MODELS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "optimizer.bin", "scaler.pt")


@dataclass(frozen=True)
class WeightMap:
    """The weight files of a folder and, with an index, the file that should hold each tensor."""

    files: tuple[Path, ...]
    index: Mapping[str, str] | None


def file_problem(folder: Path, path: Path, limit: int | None = None) -> Problem | None:
    """Why a file of the folder must not be opened, or None.

    A link may lead to another file of the folder, or, in the hub's cache (whose snapshots are made of links),
    to the ``blobs`` of the same repository.
    """
    where = str(path)
    try:
        real = path.resolve(strict=True)
        status = real.stat()
    except (OSError, RuntimeError) as error:
        return Problem(
            f"cannot be opened: {error}", where=where, rule="symlink-escape" if path.is_symlink() else "unreadable"
        )
    home = folder.resolve()
    if not real.is_relative_to(home) and not _in_own_blobs(home, real):
        return Problem(
            f"a link to {real}, outside the checkpoint; copy the file there", where=where, rule="symlink-escape"
        )
    if not stat.S_ISREG(status.st_mode):
        return Problem("not a regular file", where=where, rule="not-regular")
    if limit is not None and status.st_size > limit:
        return Problem(f"{status.st_size} bytes; at most {limit} are believed", where=where, rule="file-size")
    return None


def _in_own_blobs(home: Path, real: Path) -> bool:
    """True in ``models--org--name/snapshots/<commit>`` for targets in ``models--org--name/blobs``."""
    repository = home.parent.parent
    return (
        home.parent.name == "snapshots"
        and repository.name.startswith("models--")
        and real.parent == repository / "blobs"
        and not real.name.endswith(".incomplete")
    )


def code_problems(folder: Path) -> list[Problem]:
    """One problem for each Python file in the folder or below; hidden folders and links are not entered."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found += [Path(root, name) for name in sorted(names) if name.endswith((".py", ".pyc", ".so", ".pyd"))]
    text = "the repository carries code, which llmpack never runs; use a checkpoint without it, or delete the file"
    return [Problem(text, where=str(path), rule="remote-code") for path in found]


def weight_map(folder: Path) -> WeightMap:
    """The weight files that belong to the model. Raises InputRejected with every problem."""
    names = sorted(path.name for path in folder.iterdir())
    present = [n for n in names if n.endswith(".safetensors") and not n.startswith(".")]
    present = [n for n in present if not DUPLICATE_WEIGHTS.fullmatch(n)]
    problems = [
        Problem(
            "a download that was broken off; delete it and download again", where=str(folder / n), rule="not-weights"
        )
        for n in names
        if n.endswith(".incomplete")
    ]
    if INDEX in names:
        index, found = _read_index(folder)
        problems += found
        if index is not None:
            problems += _compare(folder, index, present)
    else:
        index = None
        problems += _without_index(folder, names, present)
    problems += [p for n in present if (p := file_problem(folder, folder / n)) is not None]
    if problems:
        raise InputRejected(problems)
    return WeightMap(tuple(folder / n for n in present), index)


def _without_index(folder: Path, names: list[str], present: list[str]) -> Iterator[Problem]:
    if present == [SINGLE]:
        return
    if present:
        listing = ", ".join(present[:8]) + (" ..." if len(present) > 8 else "")
        text = f"no {INDEX} beside {listing}; one file alone is called {SINGLE}, several need their index"
        yield Problem(text, where=str(folder), rule="index-mismatch")
        return
    pickles = [n for n in names if n.endswith(_PICKLES) and n not in _NOT_MODELS]
    if pickles:
        text = (
            f"only {', '.join(pickles[:4])}{' ...' if len(pickles) > 4 else ''}: such files can run code when they are "
            "loaded and are never opened here; use the safetensors version, or convert them in a sandbox"
        )
        yield Problem(text, where=str(folder), rule="pickle-weights")
    else:
        ggufs = [n for n in names if n.endswith(".gguf")]
        cure = f"; for {ggufs[0]} name the file itself as the source" if ggufs else ""
        yield Problem(f"no weights: neither {SINGLE} nor {INDEX}{cure}", where=str(folder), rule="not-weights")


def _read_index(folder: Path) -> tuple[dict[str, str] | None, list[Problem]]:
    path = folder / INDEX
    where = str(path)
    problem = file_problem(folder, path, MAX_INDEX)
    if problem:
        return None, [problem]
    try:
        index = parse_json(path.read_bytes())
    except ValueError as error:
        return None, [Problem(str(error), where=where, rule="index-mismatch")]
    table: Any = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(table, dict) or not table:
        return None, [Problem("no `weight_map` table", where=where, rule="index-mismatch")]
    problems = []
    for target in {repr(t): t for t in table.values()}.values():
        if not isinstance(target, str) or not _SHARD_NAME.fullmatch(target) or ".." in target:
            first = next(name for name, t in table.items() if t is target or t == target)
            text = (
                f"tensor {first[:80]!r} is said to lie in {str(target)[:120]!r}; a shard is a plain file name "
                "ending in .safetensors, in the same folder"
            )
            problems.append(Problem(text, where=where, rule="index-path"))
    return (None if problems else table), problems


def _compare(folder: Path, index: Mapping[str, str], present: list[str]) -> list[Problem]:
    where = str(folder / INDEX)
    named = set(index.values())
    problems = [
        Problem(f"shard {name} is in the index and not in the folder", where=where, rule="index-mismatch")
        for name in sorted(named - set(present))
    ]
    problems += [
        Problem(f"{name} lies in the folder and is not in the index", where=where, rule="index-mismatch")
        for name in sorted(set(present) - named)
    ]
    return problems


def placement_problems(folder: Path, index: Mapping[str, str], stored: Mapping[str, str]) -> list[Problem]:
    """Compare the index with the shard in which each tensor was found."""
    where = str(folder / INDEX)
    problems = []
    for name in sorted(index.keys() | stored.keys()):
        if name not in stored:
            text = f"tensor {name!r} is said to lie in {index[name]} and does not"
        elif name not in index:
            text = f"tensor {name!r} lies in {stored[name]} and is not in the index"
        elif index[name] != stored[name]:
            text = f"tensor {name!r} is said to lie in {index[name]} and lies in {stored[name]}"
        else:
            continue
        problems.append(Problem(text, where=where, rule="index-mismatch"))
    return problems
