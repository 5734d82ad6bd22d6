"""The one metadata key that says which U8 tensors are packed codes, and what they stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llmpack.checkpoint.safetensors_header import RULE, Header, HeaderTensor
from llmpack.checkpoint.strict_json import parse_json
from llmpack.checkpoint.tensors import StoredTensor, byte_shape, is_plain, known
from llmpack.digest import canonical_json
from llmpack.errors import Problem

KEY = "llmpack"
FORMAT = 1


def packed_metadata(encodings: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, str]:
    """`__metadata__` for tensors whose encoding is not a plain dtype: {name: (encoding, logical shape)}.

    One key only: safetensors writers disagree about the order of several, and bytes must repeat.
    """
    if not encodings:
        return {}
    table = {name: {"encoding": kind, "shape": list(shape)} for name, (kind, shape) in encodings.items()}
    return {KEY: canonical_json({"format": FORMAT, "encodings": table})}


def stored_tensors(header: Header) -> tuple[dict[str, StoredTensor], list[Problem]]:
    """The tensors of one file with encoding and logical shape, and what is wrong with the metadata."""
    where = str(header.path)
    try:
        table = _encodings(header.metadata)
    except ValueError as error:
        return {}, [Problem(f"metadata `{KEY}`: {error}", where=where, rule=RULE)]
    tensors, problems = {}, []
    for name in sorted(table.keys() - header.tensors.keys()):
        problems.append(Problem(f"metadata names the tensor {name[:80]!r}, which is not there", where=where, rule=RULE))
    for name, entry in header.tensors.items():
        try:
            kind, shape = _encoding(entry, table[name]) if name in table else (entry.dtype.lower(), entry.shape)
        except ValueError as error:
            problems.append(Problem(f"tensor {name!r}: {error}", where=where, rule=RULE))
            continue
        tensors[name] = StoredTensor(name, kind, shape, header.path, entry.offset, entry.nbytes)
    return tensors, problems


def _encodings(metadata: Mapping[str, str]) -> dict[str, Any]:
    if KEY not in metadata:
        return {}
    value = parse_json(metadata[KEY].encode())
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        found = json.dumps(value.get("format"))[:40] if isinstance(value, dict) else "none"
        raise ValueError(f"format {found} is not {FORMAT}; it was written by another version of llmpack")
    table = value.get("encodings")
    if not isinstance(table, dict):
        raise ValueError("there is no table `encodings`")
    return table


def _encoding(entry: HeaderTensor, claim: Any) -> tuple[str, tuple[int, ...]]:
    """Encoding and logical shape that the metadata claims, held against the stored bytes."""
    if not isinstance(claim, dict) or set(claim) != {"encoding", "shape"}:
        raise ValueError("its metadata has exactly encoding and shape")
    kind, shape = claim["encoding"], claim["shape"]
    if not isinstance(kind, str) or is_plain(kind) or not known(kind):
        raise ValueError(f"unknown encoding {str(kind)[:40]!r}")
    if (
        not isinstance(shape, list)
        or not 1 <= len(shape) <= 8
        or not all(type(n) is int and 0 < n < 2**63 for n in shape)
    ):
        raise ValueError(f"logical shape {str(shape)[:80]} is not a list of sizes")
    expected = byte_shape(kind, tuple(shape))
    if entry.dtype != "U8" or entry.shape != expected:
        raise ValueError(f"{kind} {shape} is stored as U8 {list(expected)}, not {entry.dtype} {list(entry.shape)}")
    return kind, tuple(shape)
