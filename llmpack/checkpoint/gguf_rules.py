"""What the values of well-known GGUF keys must be, beyond being readable.

llama.cpp aborts the process on some of these (no blocks, a token that stands twice, a NaN epsilon), so they are
refused before it sees the file. Rules: ``gguf-vocab``, ``chat-template``, ``config-range``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from llmpack.checkpoint import gguf_types as t
from llmpack.checkpoint.folder_intake import TOKENIZER_FILES
from llmpack.checkpoint.gguf_metadata_reader import Strings

if TYPE_CHECKING:
    import numpy as np
else:
    from llmpack.lazy import LazyModule

    np = LazyModule("numpy")

_VOCAB = "tokenizer.ggml."
_TOKENS = _VOCAB + "tokens"
_ARRAYS = {_TOKENS: t.STRING, _VOCAB + "scores": t.FLOAT32, _VOCAB + "token_type": t.INT32, _VOCAB + "merges": t.STRING}
_ALIGNED = (_VOCAB + "scores", _VOCAB + "token_type")
_INTEGERS = (t.UINT8, t.INT8, t.UINT16, t.INT16, t.UINT32, t.INT32, t.UINT64, t.INT64)
_SCALARS = {
    "general.architecture": (t.STRING,),
    "tokenizer.chat_template": (t.STRING,),
    _VOCAB + "model": (t.STRING,),
    _VOCAB + "pre": (t.STRING,),
    _VOCAB + "add_bos_token": (t.BOOL,),
    _VOCAB + "add_eos_token": (t.BOOL,),
    _VOCAB + "add_space_prefix": (t.BOOL,),
}
# last part of an architecture's key: inclusive bounds; one number, or one a block
_BOUNDS = {
    "block_count": (1, 1024),
    "attention.head_count": (1, 1024),
    "attention.head_count_kv": (1, 1024),
    "embedding_length": (1, 131_072),
    "vocab_size": (1, 4_194_304),
    "context_length": (1, 2**31 - 1),
}

Types = Mapping[str, tuple[int, ...]]


def value_problems(metadata: Mapping[str, Any], types: Types) -> Iterator[tuple[str, str]]:
    """(rule, message) for each value that does not hold what its key needs."""
    yield from _wrong_types(metadata, types)
    yield from _vocabulary(metadata, types)
    yield from _special_ids(metadata, types)
    template = metadata.get("tokenizer.chat_template")
    limit = TOKENIZER_FILES["chat_template.jinja"]
    if isinstance(template, str) and len(template.encode()) > limit:
        yield "chat-template", f"a chat template of {len(template.encode())} bytes; at most {limit} are believed"
    yield from _ranges(metadata)


def type_name(kind: tuple[int, ...]) -> str:
    """``"array of string"``, ``"uint32"``."""
    return " of ".join(t.VALUE_NAMES[part] for part in kind)


def _wrong_types(metadata: Mapping[str, Any], types: Types) -> Iterator[tuple[str, str]]:
    expected = {key: (t.ARRAY, element) for key, element in _ARRAYS.items()} | _SCALARS
    for key in metadata.keys() & expected.keys():
        if types[key] != expected[key]:
            rule = "gguf-vocab" if key.startswith("tokenizer.") else "gguf-bounds"
            yield rule, f"{key} is {type_name(types[key])}, not {type_name(expected[key])}"


def _tokens(metadata: Mapping[str, Any]) -> Strings | None:
    tokens = metadata.get(_TOKENS)
    return tokens if isinstance(tokens, Strings) else None


def _vocabulary(metadata: Mapping[str, Any], types: Types) -> Iterator[tuple[str, str]]:
    tokens = _tokens(metadata)
    if tokens is None:
        return
    for key in _ALIGNED:
        if key in metadata and types[key][0] == t.ARRAY and len(metadata[key]) != len(tokens):
            yield "gguf-vocab", f"{key} has {len(metadata[key])} entries for {len(tokens)} tokens"
    twice = _first_duplicate(tokens)
    if twice is not None:
        yield "gguf-vocab", f"the token {twice[:40]!r} stands twice in {_TOKENS}"


def _first_duplicate(tokens: Strings) -> str | None:
    """A token that occurs twice. Hashes of 8 bytes stand for the tokens, so that memory stays below the file's size."""
    hashes = np.fromiter((hash(raw) for raw in tokens.all_bytes()), dtype=np.int64, count=len(tokens))
    ordered = np.sort(hashes)
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    seen: set[bytes] = set()
    for index in np.flatnonzero(np.isin(hashes, list(suspects))).tolist() if suspects else ():
        raw = tokens[index].encode()
        if raw in seen:
            return raw.decode()
        seen.add(raw)
    return None


def _special_ids(metadata: Mapping[str, Any], types: Types) -> Iterator[tuple[str, str]]:
    tokens = _tokens(metadata)
    for key, value in metadata.items():
        if not (key.startswith(_VOCAB) and key.endswith("_token_id")):
            continue
        if types[key][0] not in _INTEGERS:
            yield "gguf-vocab", f"{key} is {type_name(types[key])}, not a whole number"
        elif tokens is not None and not 0 <= value < len(tokens):
            yield "gguf-vocab", f"{key} is {value}, and there are {len(tokens)} tokens"


def _ranges(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    architecture = metadata.get("general.architecture")
    for key, value in metadata.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield "config-range", f"{key} is {value}"
        prefix, _, part = key.partition(".")
        if not isinstance(architecture, str) or prefix != architecture or part not in _BOUNDS:
            continue
        low, high = _BOUNDS[part]
        if not _within(value, low, high):
            yield "config-range", f"{key}: {str(value)[:40]!r} is not between {low} and {high}"


def _within(value: Any, low: int, high: int) -> bool:
    """A whole number between the bounds, or one for each block."""
    if isinstance(value, np.ndarray):
        whole = value.dtype.kind in "iu" and 0 < value.size <= _BOUNDS["block_count"][1]
        return whole and low <= int(value.min()) and int(value.max()) <= high
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
