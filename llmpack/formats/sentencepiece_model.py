"""The pieces of a SentencePiece model, read without the sentencepiece library.

`tokenizer.model` is a protocol-buffer message; of it only the list of pieces and the kind of model
matter to GGUF. The file is untrusted: every length is checked against what is left.

Message: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
Wire format: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from llmpack.errors import InputRejected, Problem

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class PieceType(IntEnum):
    """What a piece stands for."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class ModelKind(IntEnum):
    """How a model was trained, and so how it splits text."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True)
class SentencePieceModel:
    """The pieces in order of id, and how they combine."""

    pieces: tuple[Piece, ...]
    kind: ModelKind

    @classmethod
    def parse(cls, data: bytes, where: str) -> SentencePieceModel:
        """Read a serialized model. Raises InputRejected (rule ``tokenizer``) if `data` is none."""
        try:
            pieces, kind = _model(data)
        except (ValueError, struct.error) as fault:
            message = f"not a SentencePiece model ({fault}); fetch the file again"
            raise InputRejected([Problem(message, where=where, rule="tokenizer")]) from fault
        if not pieces:
            raise InputRejected([Problem("a SentencePiece model without pieces", where=where, rule="tokenizer")])
        return cls(pieces, kind)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError(f"a number breaks off at byte {at}")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """(field number, wire type, value) of every field of one message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, wire, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"unknown wire type {wire} at byte {at}")
        if size > len(data) - at:
            raise ValueError(f"{size} bytes are announced at byte {at}, {len(data) - at} are left")
        yield number, wire, data[at : at + size]
        at += size


def _model(data: bytes) -> tuple[tuple[Piece, ...], ModelKind]:
    pieces = []
    kind = ModelKind.UNIGRAM
    for number, wire, value in _fields(data):
        if number == 1 and wire == _BYTES and isinstance(value, bytes):
            pieces.append(_piece(value))
        elif number == 2 and wire == _BYTES and isinstance(value, bytes):
            for inner, inner_wire, setting in _fields(value):
                if inner == 3 and inner_wire == _VARINT and isinstance(setting, int):
                    kind = ModelKind(setting)
    return tuple(pieces), kind


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, PieceType.NORMAL
    for number, wire, value in _fields(data):
        if number == 1 and wire == _BYTES and isinstance(value, bytes):
            text = value.decode()
        elif number == 2 and wire == _FIXED32 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif number == 3 and wire == _VARINT and isinstance(value, int):
            kind = PieceType(value)
    return Piece(text, score, kind)
