"""From texts to token sequences."""

import json

import pytest
import torch

from llmpack.calibration.corpus import Corpus, build_corpus, load_tokenizer, pieces_of
from llmpack.calibration.text import read_texts
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.errors import InputRejected, RecipeError

PROSE = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return load_tokenizer(Checkpoint.open(tiny_llama))


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "one.txt").write_text("".join(f"{i} {PROSE}\n" for i in range(8)))
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    (tmp_path / "notes" / "b.md").write_text("second " + PROSE)
    (tmp_path / "notes" / "deep" / "a.rst").write_text("third " + PROSE)
    (tmp_path / "notes" / "image.png").write_bytes(b"\x89PNG")
    lines = [{"answer": {"text": f"chat {i} {PROSE}"}, "id": i} for i in range(3)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return tmp_path


def test_every_kind_of_source_is_read_in_order(texts):
    found = read_texts(["one.txt", "notes", "chats.jsonl#answer.text", "python:pydoc_data.topics"], texts)
    assert found[0].startswith("0 The quick")
    assert [t.split()[0] for t in found[1:6]] == ["second", "third", "chat", "chat", "chat"]
    topics = found[6:]
    assert sum(map(len, topics)) > 400_000
    assert any('The "if" statement' in t for t in topics)


def test_reading_python_runs_nothing(texts):
    import sys

    sys.modules.pop("this", None)
    assert read_texts(["python:this"], texts)
    assert "this" not in sys.modules


def test_every_source_without_text_is_told(texts):
    (texts / "empty.txt").write_text(" \n")
    (texts / "latin.txt").write_bytes(b"caf\xe9" * 100)
    (texts / "broken.jsonl").write_text('{"a": "x"}\n{"a": 1}\n')
    (texts / "pictures").mkdir()
    sources = {
        "missing.txt": "no such file",
        "empty.txt": "no text",
        "latin.txt": "byte 3",
        "broken.jsonl#a": "line 2",
        "broken.jsonl": "broken.jsonl#FIELD",
        "one.txt#a": "only .jsonl",
        "pictures": "no file in this folder",
        "python:numpy": "standard library",
        "python:zlib": "no source",
        "python:json.nothing": "no source",
    }
    with pytest.raises(RecipeError) as caught:
        read_texts(list(sources), texts)
    assert len(caught.value.problems) == len(sources)
    for problem, (source, words) in zip(caught.value.problems, sources.items(), strict=True):
        assert f"`{source}`" in problem.message
        assert words in problem.message


def test_pieces_are_the_text_cut_at_line_ends():
    text = "\n".join("word " * (1 + i % 7) for i in range(200)) + "x" * 500
    pieces = pieces_of([text], 100, 0)
    assert max(map(len, pieces)) <= 100
    assert sum(p.endswith(("\n", " ")) for p in pieces) > len(pieces) - 8
    in_order = sorted(pieces, key=text.index)
    assert "".join(in_order) in text or len("".join(in_order)) < len(text)  # equal pieces count once
    assert pieces_of([text], 100, 0) == pieces
    assert pieces_of([text], 100, 1) != pieces
    assert sorted(pieces_of([text, text], 100, 1)) == sorted(pieces)


def build(tokenizer, base, sources=("one.txt",), **kw):
    return build_corpus(list(sources), tokenizer, **{"tokens": 1000, "length": 64, "seed": 0, "base": base} | kw)


def test_a_corpus_has_the_asked_shape_and_tokens_of_its_texts(tokenizer, texts):
    corpus = build(tokenizer, texts)
    assert corpus.tokens.shape == (15, 64)
    assert corpus.tokens.dtype == torch.int64
    assert corpus.length == 64
    stream = [i for text in corpus.texts for i in tokenizer(text)["input_ids"]]
    assert corpus.tokens.reshape(-1).tolist() == stream[:960]
    assert set(corpus.texts) <= set(pieces_of(read_texts(["one.txt"], texts), 32 * 64, 0))


def test_the_digest_is_that_of_the_tokens(tokenizer, texts):
    first, again = build(tokenizer, texts), build(tokenizer, texts)
    assert first.digest == again.digest
    assert torch.equal(first.tokens, again.tokens)
    others = [build(tokenizer, texts, seed=1), build(tokenizer, texts, tokens=900), build(tokenizer, texts, length=32)]
    assert len({first.digest, *(c.digest for c in others)}) == 4
    swapped = [build(tokenizer, texts, sources=s) for s in (("one.txt", "notes"), ("notes", "one.txt"))]
    assert swapped[0].digest == swapped[1].digest
    assert Corpus.of(first.tokens).digest == first.digest


def test_sequences_begin_as_the_tokenizer_begins_texts(checkpoint_factory, texts):
    tokenizer = load_tokenizer(Checkpoint.open(checkpoint_factory(tokenizer="llama-bpe")))
    corpus = build(tokenizer, texts)
    assert corpus.tokens.shape == (15, 64)
    assert (corpus.tokens[:, 0] == tokenizer.bos_token_id).all()
    assert not (corpus.tokens[:, 1:] == tokenizer.bos_token_id).any()


def test_too_little_text_is_told_in_numbers(tokenizer, texts):
    with pytest.raises(RecipeError, match=r"gives \d+ tokens, 100032 are asked for"):
        build(tokenizer, texts, tokens=100_032)
    with pytest.raises(RecipeError, match="one sequence of 64"):
        build(tokenizer, texts, tokens=63)


def test_overlap_is_the_share_of_equal_runs(tokenizer, texts):
    corpus = build(tokenizer, texts)
    assert corpus.overlap(corpus) == 1
    assert corpus.overlap(Corpus.of(corpus.tokens.flip(1))) == 0
    mixed = Corpus.of(torch.cat([corpus.tokens[:5], corpus.tokens[5:10].flip(1)]))
    assert corpus.overlap(mixed) == 0.5
    assert corpus.overlap(Corpus.of(corpus.tokens[:, :8])) == 0


def test_a_checkpoint_without_a_tokenizer_is_refused(checkpoint_factory):
    with pytest.raises(InputRejected, match="no tokenizer"):
        load_tokenizer(Checkpoint.open(checkpoint_factory(tokenizer=None)))


def test_a_tokenizer_that_transformers_cannot_load_is_refused(checkpoint_factory, tmp_path):
    import shutil

    folder = shutil.copytree(checkpoint_factory(), tmp_path / "model")
    table = json.loads((folder / "tokenizer.json").read_text())
    table["pre_tokenizer"] = {"type": "Unheard"}
    (folder / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(InputRejected) as caught:
        load_tokenizer(Checkpoint.open(folder))
    assert caught.value.problems[0].rule == "tokenizer"
