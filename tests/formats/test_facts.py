"""Names and facts against the gguf package, which llama.cpp's converter reads them with."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
from gguf.utility import model_weight_count_rounded_notation
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpack.errors import InputRejected
from llmpack.formats.facts import Facts
from llmpack.formats.gguf_metadata import GUESSED, file_type, metadata
from llmpack.formats.model_name import name_parts, size_label, title
from llmpack.models import family_of

NAMES = (
    "HuggingFaceTB/SmolLM2-135M-Instruct", "meta-llama/Llama-3.2-1B", "mistralai/Mistral-7B-Instruct-v0.3",
    "Qwen/Qwen2.5-0.5B-Instruct", "bigscience/bloom-7b1-petals", "NousResearch/Hermes-2-Pro-Llama-3-8B",
    "mistralai/Mixtral-8x7B-Instruct-v0.1", "acme/model", "model", "a-b-c", "./folder-7B", "Plain words 7B",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "x/gpt2-small-124M", "x/gpt2-small", "x/Phi-3-mini-4k-instruct",
    "x/Qwen2-7B-Instruct-1M", "x/model-Q4_K_M", "x/Falcon3-7B-Base-fp16", "x/v2-model", "x/model-v2", "x/3B",
    "x/Yi-1.5-9B-Chat-16K", "x/A3B-model", "x/Qwen3-30B-A3B", "x/iter2-model-xl", "x//double", "x/--dashes--",
)  # fmt: skip
PARTS = ("Llama", "7B", "7b", "v0.1", "2", "chat", "instruct", "Instruct", "small", "xl", "8x7B", "1.5", "Q4_0",
         "f16", "base", "128k", "3_5B", "7b1", "ABC", "x", "iter3", "A3B", "")  # fmt: skip
COUNTS = (0, 1, 999, 134_515_008, 1_235_814_400, 7_248_023_552, 46_702_792_704)


def theirs(name, count):
    full, *rest = gguf.Metadata.get_model_id_components(name, count)
    return (full, *rest)


def mine(name, count):
    parts = name_parts(name, count)
    return parts.full, parts.organization, parts.basename, parts.finetune, parts.version, parts.size_label


@pytest.mark.parametrize("count", COUNTS)
def test_parts_of_known_names(count):
    for name in NAMES:
        assert mine(name, count) == theirs(name, count), name


@settings(deadline=None)
@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map("-".join), st.sampled_from(COUNTS), st.booleans())
def test_parts_of_any_name(name, count, owned):
    if name:
        full = f"org/{name}" if owned else name
        assert mine(full, count) == theirs(full, count)


@settings(deadline=None)
@given(st.text("abcABC019.- v", max_size=20))
def test_titles(text):
    assert title(text) == gguf.Metadata.id_to_title(text)


@settings(deadline=None)
@given(st.integers(1, 10**14))
def test_size_labels(count):
    assert size_label(count) == model_weight_count_rounded_notation(count)


CARDS = {
    "no card": None,
    "no front matter": "# Model\n",
    "empty front matter": "---\n---\n",
    "not closed": "---\nlicense: mit\n",
    "licence": "---\nlicense: apache-2.0\n---\ntext\n",
    "licence by name": "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n",
    "two licences": "---\nlicense: [mit, apache-2.0]\n---\n",
    "one base model": "---\nbase_model: org/Some-Model-7B-v0.2\n---\n",
    "base models": "---\nbase_model:\n- org/a-7B\n- https://huggingface.co/o/b-v1\n- ssh://x\n- plain\n---\n",
    "base model as a table": "---\nbase_model:\n- name: Base\n  organization: Org\n  repo_url: https://example.org\n---\n",
    "data sets": "---\ndatasets:\n- acme/words-v2\n- https://huggingface.co/datasets/x\n---\n",
    "tags and languages": "---\ntags: [a, b]\npipeline_tag: text-generation\nlanguage: [en, de]\n---\n",
    "one tag": "---\ntags: a\nlanguage: en\n---\n",
    "names": "---\nmodel_name: My Model\nmodel_creator: Me\nmodel_type: llama\nversion: v3\ndescription: short\n---\n",
    "addresses": "---\nurl: https://example.org\ndoi: 10.1/2\nrepo_url: https://example.org/r\nuuid: 123e\n---\n",
    "tabs": "---\ntags:\n\t- a\n---\n",
}  # fmt: skip
CONFIGS = {"silent": {}, "named": {"_name_or_path": "acme/Named-3B-chat"}, "path": {"_name_or_path": "/home/x/y"}}
SAMPLING = {"top_k": 50, "top_p": 0.9, "temperature": 0.7, "min_p": 0.05, "do_sample": True, "mirostat": None}


def folder_of(tmp_path, card, config, sampling=None) -> Path:
    folder = tmp_path / "Folder-7B-Instruct"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if card is not None:
        (folder / "README.md").write_text(card)
    if sampling is not None:
        (folder / "generation_config.json").write_text(json.dumps(sampling))
    return folder


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("card", CARDS)
def test_general_keys_are_those_of_the_gguf_package(tmp_path, card, config):
    folder = folder_of(tmp_path, CARDS[card], CONFIGS[config], SAMPLING)
    count = 7_000_000_000
    loaded = gguf.Metadata.load(None, folder, None, count)
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_type("model")
    loaded.set_gguf_meta_model(writer)
    expected = {
        k: (v.type.name, [str(e) for e in v.value] if isinstance(v.value, list) else v.value)
        for k, v in writer.kv_data[0].items()
    }
    found = metadata(Facts.of_folder(folder, folder.name, count), "llama", {}, (), count)
    general = {k: (v.type.name, list(v.data) if v.element is not None else v.data) for k, v in found.items()}
    assert general.pop("general.file_type") == ("UINT32", GUESSED)
    assert general.pop("general.quantization_version") == ("UINT32", 2)
    assert general == expected
    assert list(general) == list(expected)


def test_scalars_of_a_card_stay_what_was_written(tmp_path):
    card = "---\nlanguage: [en, no, on]\nversion: 1.0\nlicense:\nmodel_name: ~\ntags: [2024-01-31, 0x10]\n---\n"
    facts = Facts.of_folder(folder_of(tmp_path, card, {}), "name", 10**9)
    assert facts.languages == ("en", "no", "on")
    assert facts.version == "1.0"
    assert facts.license is None
    assert facts.name == "Name"
    assert facts.tags == ("2024-01-31", "0x10")


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("README.md", b"---\na: [1\n---\n", "model-card"),
        ("README.md", b"---\na: \xff\n---\n", "model-card"),
        ("README.md", b"---\n" + b"[" * 100_000 + b"\n---\n", "model-card"),
        ("README.md", b"x" * (5 << 20), "file-size"),
        ("generation_config.json", b"{", "generation-config"),
        ("generation_config.json", b'{"top_k": 0.5}', "generation-config"),
        ("generation_config.json", b'{"top_p": "much"}', "generation-config"),
        ("config.json", b"[", "config-json"),
    ],
)
def test_damaged_files_are_refused_by_rule(tmp_path, name, content, rule):
    folder = folder_of(tmp_path, None, {})
    (folder / name).write_bytes(content)
    with pytest.raises(InputRejected) as refusal:
        Facts.of_folder(folder, "x", 1)
    assert [p.rule for p in refusal.value.problems] == [rule]
    assert name in str(refusal.value)


def test_a_card_outside_the_folder_is_refused(tmp_path):
    (tmp_path / "secret").write_text("---\nlicense: mit\n---\n")
    folder = folder_of(tmp_path, None, {})
    (folder / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(InputRejected) as refusal:
        Facts.of_folder(folder, "x", 1)
    assert refusal.value.problems[0].rule == "symlink-escape"


def test_facts_of_a_gguf_file_are_kept(tmp_path):
    first = Facts.of_folder(folder_of(tmp_path, CARDS["base models"], CONFIGS["named"], SAMPLING), "x", 7 * 10**9)
    keys = {key: value.data for key, value in metadata(first, "llama", {}, (), 7 * 10**9).items()}
    assert Facts.of_gguf(keys, "other") == first
    assert Facts.of_gguf({}, "other") == Facts("other")
    assert Facts.of_gguf({"general.base_model.count": 2**40}, "x").base_models == ({},)


def test_the_file_type_is_that_of_most_numbers_in_blocks(tiny_llama):
    config = json.loads((tiny_llama / "config.json").read_text())
    graph = family_of(config).graph(config)
    assert file_type(graph.tensors) == gguf.LlamaFileType.ALL_F32
    down = graph.with_encodings(lambda t: "q8_0" if t.part == "ffn.down" else "iq4_nl")
    assert file_type(down.tensors) == gguf.LlamaFileType.MOSTLY_IQ4_NL
    embedding = graph.with_encodings(lambda t: "q8_0" if t.block is None else "q4_0")
    assert file_type(embedding.tensors) == gguf.LlamaFileType.MOSTLY_Q4_0


def test_file_types_are_llama_cpps():
    from llmpack.formats.gguf_metadata import FILE_TYPES

    small = {"q3_k": "Q3_K_S", "q4_k": "Q4_K_S", "q5_k": "Q5_K_S"}
    for name, number in FILE_TYPES.items():
        word = "ALL_F32" if name == "f32" else f"MOSTLY_{small.get(name, name.upper())}"
        assert gguf.LlamaFileType[word] == number
