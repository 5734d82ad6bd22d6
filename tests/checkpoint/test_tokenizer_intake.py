"""Rules D1, D3 (size) and D4: tokenizer files, held against the embedding."""

import copy
import json
import pickle
import random

import pytest
from checkpoint_files import TOKENIZER, TOKENS, rules, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.tokenizer_intake import tokenizer_problems
from llmpack.errors import InputRejected


def refused(folder):
    with pytest.raises(InputRejected) as refusal:
        Checkpoint.open(folder)
    return refusal


def tokenizer(**changes):
    value = copy.deepcopy(TOKENIZER)
    value["model"] |= changes.pop("model", {})
    return value | changes


BAD = {
    "a list": [],
    "no model": {"version": "1.0"},
    "model is a text": tokenizer() | {"model": "BPE"},
    "no vocabulary": tokenizer() | {"model": {"type": "BPE"}},
    "vocabulary is a number": tokenizer(model={"vocab": 3}),
    "id beyond the embedding": tokenizer(model={"vocab": TOKENS | {"far": 12}}),
    "id 2^32 - 1": tokenizer(model={"vocab": TOKENS | {"far": 2**32 - 1}}),
    "id -1": tokenizer(model={"vocab": TOKENS | {"far": -1}}),
    "id true": tokenizer(model={"vocab": TOKENS | {"far": True}}),
    "id as text": tokenizer(model={"vocab": TOKENS | {"far": "5"}}),
    "id 5.0": tokenizer(model={"vocab": TOKENS | {"far": 5.0}}),
    "one id for two tokens": tokenizer(model={"vocab": TOKENS | {"c": 2}}),
    "added token on a taken id": tokenizer(added_tokens=[{"id": 3, "content": "<pad>"}]),
    "added token beyond the embedding": tokenizer(added_tokens=[{"id": 4000, "content": "<pad>"}]),
    "added token without id": tokenizer(added_tokens=[{"content": "<pad>"}]),
    "added token is a text": tokenizer(added_tokens=["<pad>"]),
    "added tokens are a table": tokenizer(added_tokens={}),
    "unigram larger than the embedding": tokenizer(
        model={"type": "Unigram", "vocab": [[f"t{i}", 0.0] for i in range(13)]}
    ),
    "unigram entry without score": tokenizer(model={"type": "Unigram", "vocab": [["a"]]}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_vocabularies_are_refused(tmp_path, case):
    folder = write_folder(tmp_path / "m", tokenizer=BAD[case])
    refusal = refused(folder)
    assert rules(refusal) == {"tokenizer"}
    assert refusal.value.problems[0].where == str(folder / "tokenizer.json")


RAW = {
    "empty": b"",
    "not JSON": b"{",
    "duplicate keys": b'{"model": {"vocab": {}}, "model": {"vocab": {}}}',
    "duplicate tokens": b'{"model": {"vocab": {"a": 0, "a": 1}}}',
    "brackets never closed": b'{"model": ' + b"[" * 100_000,
    "strings never closed": b'{"model": {"merges": ["' + b"a" * 1000,
    "bad UTF-8": b'{"model": {"vocab": {"\xff": 0}}}',
    "a pickle": pickle.dumps({"model": 1}),
    "a web page": b"<html>login</html>",
    "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("case", RAW)
def test_bad_bytes_are_refused(folder, case):
    (folder / "tokenizer.json").write_bytes(RAW[case])
    assert rules(refused(folder)) == {"tokenizer"}


@pytest.mark.parametrize(
    ("name", "data", "rule"),
    [
        ("tokenizer.model", pickle.dumps([1]), "tokenizer"),
        ("tokenizer.model", b"PK\3\4archive", "tokenizer"),
        ("tokenizer_config.json", b"[]", "tokenizer"),
        ("special_tokens_map.json", b"{", "tokenizer"),
        ("generation_config.json", b'{"a": 1, "a": 2}', "tokenizer"),
        ("merges.txt", b"\xff\xfe", "tokenizer"),
        ("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": ["t.X", null]}}', "remote-code"),
        ("tokenizer_config.json", json.dumps({"chat_template": "x" * 70_000}).encode(), "chat-template"),
        ("chat_template.jinja", b"x" * 70_000, "chat-template"),
        ("special_tokens_map.json", b" " * (1 << 21), "file-size"),
    ],
)
def test_bad_files_beside_it_are_refused(folder, name, data, rule):
    (folder / name).write_bytes(data)
    refusal = refused(folder)
    assert rules(refusal) == {rule}
    assert name in str(refusal.value)


@pytest.mark.parametrize(("name", "size"), [("tokenizer.model", 33 << 20), ("tokenizer.json", 129 << 20)])
def test_absurd_sizes_are_refused_before_reading(folder, name, size):
    with (folder / name).open("wb") as file:
        file.truncate(size)  # sparse
    assert rules(refused(folder)) == {"file-size"}


@pytest.mark.parametrize(
    "value",
    [
        tokenizer(),
        tokenizer(added_tokens=None),
        tokenizer(model={"type": "Unigram", "vocab": [["<s>", 0.0], ["</s>", -1.5], ["a", -2]]}),
        tokenizer(model={"merges": [["a", "b"], ["[", '"']], "vocab": TOKENS | {'"]}': 5, "\\": 6, "é😀": 7}}),
        {"added_tokens": [], "model": {"vocab": {}}},
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_good_vocabularies_are_let_through(folder, value, indent):
    (folder / "tokenizer.json").write_text(json.dumps(value, indent=indent, ensure_ascii=indent is None))
    assert len(Checkpoint.open(folder).tokenizer_files) == 2


def test_a_tokenizer_as_the_library_saves_it(folder):
    library = Tokenizer(models.BPE(vocab=TOKENS, merges=[("a", "b")]))
    library.add_special_tokens(["<pad>"])
    library.save(str(folder / "tokenizer.json"))
    Checkpoint.open(folder)


def test_files_are_listed_by_name_and_only_known_ones(folder):
    (folder / "notes.txt").write_text("")
    (folder / "merges.txt").write_text("a b\n")
    assert [p.name for p in Checkpoint.open(folder).tokenizer_files] == [
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=120))
def test_any_bytes_give_a_verdict(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "tokenizer.json"
    path.write_bytes(data)
    for problem in tokenizer_problems((path,), 12):
        assert problem.rule == "tokenizer"


def test_mutations_give_a_verdict(tmp_path):
    path = tmp_path / "tokenizer.json"
    good = json.dumps(TOKENIZER).encode()
    chance = random.Random(3)
    for _ in range(1000):
        data = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(data))
            data[at : at + chance.randrange(2)] = chance.choice(
                [b"", b'"', b"{", b"}", b"[", b"]", b",", b"\\", b"9", b"\xff"]
            )
        path.write_bytes(data)
        for problem in tokenizer_problems((path,), 12):
            assert problem.rule == "tokenizer"
