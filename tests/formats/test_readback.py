"""Reading back: real files, the real runtime, and one planted fault at a time."""

from __future__ import annotations

import dataclasses
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.errors import VerificationFailed
from llmpack.formats.facts import Facts
from llmpack.formats.gguf import GgufFormat
from llmpack.formats.gguf_container import Container, string, uint32
from llmpack.formats.probes import CONVERSATIONS, TEXTS
from llmpack.formats.readback import compare_file, read_back
from llmpack.models import open_model
from llmpack.runtime.settings import RuntimeSettings

FACTS = Facts("tiny")
FORMAT = GgufFormat("f16")
SETTINGS = RuntimeSettings(threads=1)

pytestmark = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")


def write(folder: Path, path: Path) -> Path:
    checkpoint = Checkpoint.open(folder)
    FORMAT.write(checkpoint, open_model(checkpoint), path, FACTS)
    return path


def back(path: Path, folder: Path):
    checkpoint = Checkpoint.open(folder)
    return read_back(path, checkpoint, open_model(checkpoint), FORMAT, FACTS, SETTINGS)


def differences(path: Path, folder: Path) -> list[str]:
    checkpoint = Checkpoint.open(folder)
    graph = open_model(checkpoint)
    container = FORMAT.container(graph, checkpoint, FACTS)
    return [p.message for p in compare_file(path, checkpoint, FORMAT.encode_graph(graph), container)]


def failures(path: Path, folder: Path) -> list[str]:
    with pytest.raises(VerificationFailed) as failure:
        back(path, folder)
    assert failure.value.exit_code == 8
    return [p.message for p in failure.value.problems]


def changed(folder: Path, target: Path, name: str, change) -> Path:
    """A copy of a checkpoint with one JSON file changed."""
    shutil.copytree(folder, target)
    content = json.loads((target / name).read_text())
    change(content)
    (target / name).write_text(json.dumps(content, ensure_ascii=False))
    return target


@pytest.fixture(scope="module")
def smollm_file(smollm, tmp_path_factory) -> Path:
    return write(smollm, tmp_path_factory.mktemp("file") / "model.gguf")


@pytest.fixture(scope="module")
def spm_file(spm_llama, tmp_path_factory) -> Path:
    return write(spm_llama, tmp_path_factory.mktemp("file") / "model.gguf")


def test_byte_level_bpe_reads_back(smollm_file, smollm):
    found = back(smollm_file, smollm)
    assert found.tensors == 20
    assert found.nbytes == smollm_file.stat().st_size
    assert found.texts == 4 * (len(TEXTS) + 6 * 17)
    assert found.conversations == len(CONVERSATIONS)
    assert found.notes == ()


@pytest.mark.parametrize("kind", ["spm_llama", "json_llama", "silent_llama"])
def test_sentencepiece_reads_back(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    found = back(write(folder, tmp_path / "model.gguf"), folder)
    assert found.texts > 4 * len(TEXTS)
    assert found.conversations == len(CONVERSATIONS)
    assert ["llama.cpp follows SentencePiece" in note for note in found.notes] == [True]


def test_a_bare_sentencepiece_model_reads_back(spm_mistral, tmp_path):
    found = back(write(spm_mistral, tmp_path / "model.gguf"), spm_mistral)
    assert found.notes == ("the model has no chat template",)


def test_without_a_space_before_the_text(spm_llama, tmp_path):
    folder = changed(spm_llama, tmp_path / "x", "tokenizer_config.json", lambda c: c.update(add_prefix_space=False))
    assert back(write(folder, tmp_path / "model.gguf"), folder).tensors == 22


# --- faults in the file


def test_one_flipped_bit_is_found(spm_file, spm_llama, tmp_path):
    tensor = GgufFile.open(spm_file).tensors["blk.1.attn_k.weight"]
    data = bytearray(spm_file.read_bytes())
    data[tensor.offset + 5 * tensor.nbytes // tensor.shape[0]] ^= 16
    (tmp_path / "x.gguf").write_bytes(data)
    (message,) = failures(tmp_path / "x.gguf", spm_llama)
    assert message == "blk.1.attn_k.weight: 1 of 32 rows are not those of model.layers.1.self_attn.k_proj.weight"


def test_swapped_tensors_are_found(spm_file, spm_llama, tmp_path):
    tensors = GgufFile.open(spm_file).tensors
    one, other = tensors["blk.0.ffn_gate.weight"], tensors["blk.0.ffn_up.weight"]
    data = bytearray(spm_file.read_bytes())
    first, second = (data[t.offset : t.offset + t.nbytes] for t in (one, other))
    data[one.offset : one.offset + one.nbytes], data[other.offset : other.offset + other.nbytes] = second, first
    (tmp_path / "x.gguf").write_bytes(data)
    assert len(differences(tmp_path / "x.gguf", spm_llama)) == 2


def rewritten(path: Path, folder: Path, target: Path, keys=None, rename=None) -> Path:
    """The file with another head, as a faulty writer would write it."""
    checkpoint = Checkpoint.open(folder)
    container = FORMAT.container(open_model(checkpoint), checkpoint, FACTS)
    metadata = {k: v for k, v in {**container.metadata, **(keys or {})}.items() if v is not None}
    entries = tuple(dataclasses.replace(e, name=(rename or {}).get(e.name, e.name)) for e in container.tensors)
    other = Container(metadata, entries)
    target.write_bytes(other.header + path.read_bytes()[len(container.header) :])
    return target


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"general.file_type": uint32(7)}, "general.file_type is 7, 1 was meant"),
        ({"general.quantization_version": string("2")}, "general.quantization_version has the type"),
        ({"llama.rope.freq_base": None}, "keys are missing (['llama.rope.freq_base'])"),
        ({"general.description": string("x")}, "too many (['general.description'])"),
        ({"tokenizer.chat_template": string("{{ messages }}")}, "tokenizer.chat_template is {{ messages }}"),
    ],
)
def test_wrong_keys_are_found(spm_file, spm_llama, tmp_path, keys, message):
    found = differences(rewritten(spm_file, spm_llama, tmp_path / "x.gguf", keys), spm_llama)
    assert any(message in text for text in found), found


def test_wrong_names_and_sizes_are_found(spm_file, spm_llama, tmp_path):
    names = {"blk.0.attn_q.weight": "blk.0.attn_k.weight", "blk.0.attn_k.weight": "blk.0.attn_q.weight"}
    found = "\n".join(differences(rewritten(spm_file, spm_llama, tmp_path / "x.gguf", rename=names), spm_llama))
    assert "in another order" in found
    assert "blk.0.attn_q.weight: shape and type are ((32, 64), 1), ((64, 64), 1) was meant" in found


def test_a_damaged_file_is_found_by_the_reader(spm_file, spm_llama, tmp_path):
    (tmp_path / "x.gguf").write_bytes(spm_file.read_bytes()[:-100])
    assert "the file was cut off" in "\n".join(failures(tmp_path / "x.gguf", spm_llama))


# --- faults that only the runtime shows


def test_another_way_to_split_text_is_found(smollm_file, smollm, tmp_path):
    """Digits one by one or not: the check hash is the same for both, the probe texts tell them apart."""

    def merge_digits(tokenizer):
        tokenizer["pre_tokenizer"] = tokenizer["pre_tokenizer"]["pretokenizers"][1]

    folder = changed(smollm, tmp_path / "x", "tokenizer.json", merge_digits)
    assert differences(smollm_file, folder) == []
    found = failures(smollm_file, folder)
    assert any("3   33" in message for message in found)
    assert all("to llama.cpp and" in message for message in found)


def test_another_chat_template_is_found(smollm_file, smollm, tmp_path):
    from llmpack.formats.readback import compare_conversations
    from llmpack.formats.reference_tokenizer import ReferenceTokenizer
    from llmpack.runtime.llama import LlamaRuntime

    def refuse_system(config):
        config["chat_template"] = (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        )

    folder = changed(smollm, tmp_path / "x", "tokenizer_config.json", refuse_system)
    checkpoint = Checkpoint.open(folder)
    keys = dict(FORMAT.container(open_model(checkpoint), checkpoint, FACTS).metadata)
    reference = ReferenceTokenizer(checkpoint, keys)
    with LlamaRuntime() as runtime:
        runtime.open(smollm_file, SETTINGS, None)
        compared, problems, _ = compare_conversations(runtime, reference)
        assert compared == len(problems) == len(CONVERSATIONS)
        assert "transformers refuses it (TemplateError: no system)" in problems[1].message
    # what both refuse is no difference, and worth a note
    found = back(write(folder, tmp_path / "model.gguf"), folder)
    assert found.conversations == len(CONVERSATIONS) - 1
    assert found.notes == ("the chat template refuses a conversation of system, user",)


@pytest.mark.parametrize(
    "template",
    ["{% for m in messages %}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.nothing() }}"],
)
def test_a_template_that_takes_nothing_is_found(smollm, tmp_path, template):
    folder = changed(smollm, tmp_path / "x", "tokenizer_config.json", lambda c: c.update(chat_template=template))
    (message,) = failures(write(folder, tmp_path / "model.gguf"), folder)
    assert message.startswith("the chat template does not take one question: llama.cpp refuses it")


@pytest.mark.slow
def test_the_demo_model_reads_back(demo_checkpoint, tmp_path):
    found = back(write(demo_checkpoint, tmp_path / "model.gguf"), demo_checkpoint)
    assert (found.tensors, found.notes) == (272, ())
