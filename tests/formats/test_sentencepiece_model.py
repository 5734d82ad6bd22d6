"""The reader of tokenizer.model against the sentencepiece library, and against damage."""

from __future__ import annotations

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpack.errors import InputRejected
from llmpack.formats.sentencepiece_model import ModelKind, PieceType, SentencePieceModel


def test_pieces_are_those_of_the_library(sentencepiece_model):
    theirs = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    model = SentencePieceModel.parse(sentencepiece_model, "x")
    assert model.kind is ModelKind.BPE
    assert len(model.pieces) == theirs.vocab_size()
    for index, piece in enumerate(model.pieces):
        assert piece.text == theirs.id_to_piece(index)
        assert piece.score == theirs.get_score(index)
        assert (piece.type is PieceType.CONTROL) == theirs.is_control(index)
        assert (piece.type is PieceType.UNKNOWN) == theirs.is_unknown(index)
        assert (piece.type is PieceType.BYTE) == theirs.is_byte(index)


def parsed(data: bytes) -> SentencePieceModel | None:
    """The model, or None where it is refused by the rule for tokenizers."""
    try:
        return SentencePieceModel.parse(data, "file")
    except InputRejected as refusal:
        return None if refusal.problems[0].rule == "tokenizer" and "file" in str(refusal) else pytest.fail(str(refusal))


def test_every_way_to_cut_a_model_off_is_noticed_or_is_a_shorter_model(sentencepiece_model):
    whole = parsed(sentencepiece_model).pieces
    for end in range(2000):
        model = parsed(sentencepiece_model[:end])
        assert model is None or model.pieces == whole[: len(model.pieces)]


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_model_or_refused(data):
    parsed(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # a piece of 2^63 bytes
        b"\x80" * 100,  # a number without an end
        b"\x0b",  # an unknown wire type
        b"\x0a\x02\x18\x09",  # a piece of an unknown type
        b"\x0a\x03\x0a\x01\xff",  # a piece that is no text
    ],
)
def test_hostile_models_are_refused(data):
    assert parsed(data) is None
