"""Special tokens, flags and templates against llama.cpp's own reading of the same files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf_oracle import special_keys as oracle_keys

from llmpack.checkpoint.tokenizer_intake import tokenizer_files
from llmpack.errors import InputRejected
from llmpack.formats.gguf_container import ValueType
from llmpack.formats.gguf_special import merge_texts, special_keys
from llmpack.formats.tokenizer_files import TokenizerFiles

TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<mask>", "<cls>", "<sep>", "<|eot|>")


def special(token):
    return {"SpecialToken": {"id": token, "type_id": 0}}


A, B = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")


def template(single, pair=()):
    return {"type": "TemplateProcessing", "single": list(single), "pair": list(pair)}


NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
ROBERTA = {"type": "RobertaProcessing", "cls": ["<s>", 1], "sep": ["</s>", 2]}
CLS, SEP, EOS = special("<cls>"), special("<sep>"), special("</s>")
NORMALIZERS = [{"type": "NFD"}, {"type": "Lowercase"}, {"type": "StripAccents"}]
LLAMA3 = template([special("<s>"), A], [special("<s>"), A, special("<s>"), B])

# name: (tokenizer.json beyond added tokens, tokenizer_config.json, config.json)
CASES = {
    "nothing said": ({}, {}, {}),
    "names only": ({}, NAMED, {}),
    "names as tables": ({}, {role: {"content": token} for role, token in NAMED.items()}, {}),
    "flags": ({}, NAMED | {"add_bos_token": True, "add_eos_token": False, "add_prefix_space": True}, {}),
    "ids from the config": ({}, {}, {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 3}),
    "names before ids": ({}, NAMED, {"bos_token_id": 5, "pad_token_id": 0}),
    "a name that is no token": ({}, NAMED | {"pad_token": "<nowhere>"}, {}),
    "begins with bos": ({"post_processor": LLAMA3}, NAMED, {}),
    "begins with bos, the table form": ({"post_processor": LLAMA3}, NAMED | {"bos_token": {"content": "<s>"}}, {}),
    "begins with bos, unnamed": ({"post_processor": LLAMA3}, {"eos_token": "</s>"}, {}),
    "the flag overrules": ({"post_processor": LLAMA3}, NAMED | {"add_bos_token": False}, {}),
    "begins with something else": ({"post_processor": template([special("<pad>"), A])}, NAMED, {}),
    "ends with eos": ({"post_processor": template([A, EOS], [A, EOS, B, EOS])}, NAMED, {}),
    "ends with a turn": ({"post_processor": template([special("<s>"), A, special("<|eot|>")])}, NAMED, {}),
    "both ends": (
        {"post_processor": template([CLS, A, SEP], [CLS, A, SEP, B, SEP])},
        {"cls_token": "<cls>", "sep_token": "<sep>", "mask_token": "<mask>", "pad_token": "<pad>"},
        {},
    ),
    "separated": ({"post_processor": template([A], [A, special("<sep>"), B])}, NAMED | {"sep_token": "<sep>"}, {}),
    "separated twice": ({"post_processor": template([A], [A, special("</s>"), special("</s>"), B])}, NAMED, {}),
    "separated by a stranger": ({"post_processor": template([A], [A, special("<pad>"), B])}, NAMED, {}),
    "a sequence": ({"post_processor": {"type": "Sequence", "processors": [{"type": "ByteLevel"}, LLAMA3]}}, NAMED, {}),
    "roberta": ({"post_processor": ROBERTA}, NAMED, {}),
    "roberta, unnamed": ({"post_processor": ROBERTA}, {"x": 1}, {}),
    "cls stands for bos": ({}, {"cls_token": "<cls>", "sep_token": "<sep>"}, {}),
    "template": ({}, NAMED | {"chat_template": "{{ messages }}"}, {}),
    "named templates": (
        {},
        NAMED
        | {
            "chat_template": [
                {"name": "default", "template": "D"},
                {"name": "tool use", "template": "T"},
                {"name": "rag", "template": "R"},
            ]
        },
        {},
    ),
    "lower case": ({"normalizer": {"type": "Lowercase"}}, NAMED, {}),
    "bert": ({"normalizer": {"type": "BertNormalizer", "lowercase": False, "strip_accents": None}}, NAMED, {}),
    "normalizers in a row": (
        {"normalizer": {"type": "Sequence", "normalizers": NORMALIZERS}},
        NAMED,
        {},
    ),
}  # fmt: skip


def lay_out(folder: Path, tokenizer, config, settings) -> Path:
    folder.mkdir()
    added = [{"id": i, "content": token, "special": True} for i, token in enumerate(TOKENS)]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": {"type": "BPE"}, **tokenizer}))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def read(folder: Path) -> TokenizerFiles:
    return TokenizerFiles.read(folder, sorted(folder.iterdir()))


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Folder and the converter's keys for every case, from one process."""
    root = tmp_path_factory.mktemp("special")
    folders = [lay_out(root / name.replace(" ", "-"), *case) for name, case in CASES.items()]
    return dict(zip(CASES, zip(folders, oracle_keys(folders), strict=True), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_keys_are_the_converters(answers, case):
    folder, theirs = answers[case]
    settings = json.loads((folder / "config.json").read_text())
    found = special_keys(read(folder), settings, len(TOKENS), merges=False)
    mine = {key: [ValueType(value.type).name, value.data] for key, value in found.items()}
    if "tokenizer.chat_templates" in theirs:
        theirs["tokenizer.chat_templates"][1].sort()  # the converter writes a set
        mine["tokenizer.chat_templates"][1] = list(mine["tokenizer.chat_templates"][1])
    assert mine == theirs


def test_template_files_count_where_the_config_has_none(tmp_path):
    folder = lay_out(tmp_path / "a", {}, NAMED, {})
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert special_keys(read(folder), {}, 8, merges=False)["tokenizer.chat_template"].data == "from json"
    (folder / "chat_template.jinja").write_text("from jinja")
    assert special_keys(read(folder), {}, 8, merges=False)["tokenizer.chat_template"].data == "from jinja"


def test_templates_of_a_sub_folder_are_not_read(tmp_path):
    folder = lay_out(tmp_path / "a", {}, NAMED, {})
    (folder / "chat_template.jinja").write_text("D")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("R")
    paths, problems = tokenizer_files(folder)
    mine = special_keys(TokenizerFiles.read(folder, paths), {}, len(TOKENS), merges=False)
    (theirs,) = oracle_keys([folder])
    assert problems == []
    assert theirs.keys() - mine.keys() == {"tokenizer.chat_template.rag", "tokenizer.chat_templates"}
    assert mine["tokenizer.chat_template"].data == theirs["tokenizer.chat_template"][1] == "D"


def test_two_equal_templates_are_one_and_two_different_ones_are_refused(tmp_path):
    folder = lay_out(tmp_path / "a", {}, NAMED | {"chat_template": "same"}, {})
    (folder / "chat_template.jinja").write_text("same")
    assert special_keys(read(folder), {}, 8, merges=False)["tokenizer.chat_template"].data == "same"
    (folder / "chat_template.jinja").write_text("other")
    with pytest.raises(InputRejected, match=r"contradicts chat_template.jinja") as refusal:
        special_keys(read(folder), {}, 8, merges=False)
    assert refusal.value.problems[0].rule == "tokenizer"


@pytest.mark.parametrize("number", [-1, 8, 32000])
def test_ids_without_a_token_are_refused(tmp_path, number):
    folder = lay_out(tmp_path / "a", {}, NAMED, {})
    with pytest.raises(InputRejected, match=rf"pad_token has the id {number}; the vocabulary has 8 tokens"):
        special_keys(read(folder), {"pad_token_id": number}, 8, merges=False)


@pytest.mark.parametrize("template", [3, ["x"], [{"name": "a"}], {"template": "x"}])
def test_a_template_of_another_form_is_refused(tmp_path, template):
    folder = lay_out(tmp_path / "a", {}, NAMED | {"chat_template": template}, {})
    with pytest.raises(InputRejected, match="`chat_template` is a text, or a list"):
        special_keys(read(folder), {}, 8, merges=False)


@pytest.mark.parametrize(
    ("merges", "expected"),
    [
        (["a b", "ab c"], ["a b", "ab c"]),
        ([["a", "b"], ["ab", "c"]], ["a b", "ab c"]),
        ([["a b", " "]], ["aĠb Ġ"]),
    ],
)
def test_merges_have_two_spellings(tmp_path, merges, expected):
    folder = lay_out(tmp_path / "a", {"model": {"type": "BPE", "merges": merges}}, NAMED, {})
    assert merge_texts(read(folder)) == expected


def test_merges_of_a_text_file(tmp_path):
    folder = lay_out(tmp_path / "a", {}, NAMED, {})
    with pytest.raises(InputRejected, match="has no merges"):
        merge_texts(read(folder))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n\nab c\n")
    assert merge_texts(read(folder)) == ["a b", "ab c"]
    (folder / "merges.txt").write_text("a b\nab\n")
    with pytest.raises(InputRejected, match="1 lines are merges of two parts"):
        merge_texts(read(folder))
    bad = lay_out(tmp_path / "b", {"model": {"merges": [["a"]]}}, NAMED, {})
    with pytest.raises(InputRejected, match="a merge is a pair of texts"):
        merge_texts(read(bad))
