"""How many token ids a tokenizer can produce, read from its files without loading it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmpack.errors import InputRejected, Problem


def tokenizer_size(folder: Path) -> int | None:
    """One more than the largest id of the tokenizer in a checkpoint's folder; None without a tokenizer.

    ``tokenizer.json`` counts where it exists (it is what transformers loads), else ``tokenizer.model``, else
    ``vocab.json`` with ``added_tokens.json``. Raises InputRejected (``tokenizer``) for a file that cannot be read.
    """
    try:
        if (folder / "tokenizer.json").is_file():
            return 1 + max(_ids_of_json(json.loads((folder / "tokenizer.json").read_bytes())), default=-1)
        added = folder / "added_tokens.json"
        extra: list[int] = list(json.loads(added.read_bytes()).values()) if added.is_file() else []
        if (folder / "tokenizer.model").is_file():
            pieces = sum(field == 1 for field, _ in _fields((folder / "tokenizer.model").read_bytes()))
            return max([pieces, *(index + 1 for index in extra)])
        if (folder / "vocab.json").is_file():
            return 1 + max([*json.loads((folder / "vocab.json").read_bytes()).values(), *extra], default=-1)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as broken:
        text = f"the tokenizer cannot be read ({type(broken).__name__}: {broken}); fetch it again"
        raise InputRejected([Problem(text, where=str(folder), rule="tokenizer")]) from broken
    return None


def _ids_of_json(tokenizer: Any) -> Iterator[int]:
    vocab = tokenizer["model"]["vocab"]
    # unigram models list [piece, score] pairs, the others map pieces to ids
    yield from vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    yield from (token["id"] for token in tokenizer.get("added_tokens") or ())


def _fields(message: bytes) -> Iterator[tuple[int, int]]:
    """(field number, length) of the top level of a protocol buffer message."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        kind = key & 7
        if kind == 0:
            _, end = _varint(message, position)
        elif kind == 2:
            length, position = _varint(message, position)
            end = position + length
        elif kind in (1, 5):
            end = position + (8 if kind == 1 else 4)
        else:
            raise ValueError(f"wire type {kind} at byte {position}")
        if end > len(message):
            raise ValueError(f"field {key >> 3} at byte {position} runs beyond the end")
        yield key >> 3, end - position
        position = end


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError(f"endless number at byte {position}")
