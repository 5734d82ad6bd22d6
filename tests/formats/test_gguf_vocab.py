"""Vocabularies: which pre-tokenizer, and what is refused."""

from __future__ import annotations

import json
import re

import pytest
from gguf_oracle import llama_cpp
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from llmpack.errors import InputRejected
from llmpack.formats.added_tokens import added_tokens
from llmpack.formats.gguf_pretokenizer import PRE_TOKENIZERS, PROBE, fingerprint, pre_tokenizer, probe_tokenizer
from llmpack.formats.gguf_special import merge_texts
from llmpack.formats.gguf_vocab import vocabulary
from llmpack.formats.tokenizer_files import TokenizerFiles

CONFIG = {"vocab_size": 608}


def files(folder, contents) -> TokenizerFiles:
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return TokenizerFiles.read(folder, sorted(folder.iterdir()))


def rejected(call, *arguments):
    with pytest.raises(InputRejected) as refusal:
        call(*arguments)
    return refusal.value.problems[0]


def test_the_table_is_llama_cpps():
    source = (llama_cpp() / "conversion" / "base.py").read_text()
    pairs = dict(re.findall(r'chkhsh == "([0-9a-f]{64})":\s+# ref: \S+\s+res = "([^"]+)"', source))
    assert len(pairs) > 80
    assert {digest: pairs.get(digest) for digest in PRE_TOKENIZERS} == PRE_TOKENIZERS
    (literal,) = re.findall(r"chktxt = ('.*')\n", source)
    import ast

    assert ast.literal_eval(literal) == PROBE


def test_smollm_is_known_with_and_without_an_opening_token(smollm_files):
    tokenizer = Tokenizer.from_buffer(smollm_files["tokenizer.json"])
    assert pre_tokenizer(tokenizer, None, "x") == "smollm"
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    assert pre_tokenizer(tokenizer, 1, "x") == "smollm"


def test_an_unknown_pre_tokenizer_is_refused_with_its_hash(tmp_path, tiny_llama):
    """The tiny tokenizer of the tests splits like SmolLM's and has another vocabulary, so its hash is unknown."""
    contents = {name: (tiny_llama / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    read = files(tmp_path, contents)
    problem = rejected(vocabulary, read, {"vocab_size": 512})
    digest = fingerprint(Tokenizer.from_buffer(contents["tokenizer.json"]).encode(PROBE).ids)
    assert (problem.rule, problem.where) == ("pre-tokenizer", str(tmp_path / "tokenizer.json"))
    assert digest in problem.message


def test_a_regular_expression_without_end_is_refused():
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?:(\S+|\s+)*)*(?<=[MN])\z"), "isolated")
    assert rejected(pre_tokenizer, tokenizer, None, "x").rule == "tokenizer-timeout"


SPLITS = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "with a space before": [pre_tokenizers.ByteLevel(add_prefix_space=True)],
    "digits": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama 3": [
        pre_tokenizers.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC(), normalizers.Sequence([normalizers.NFKC()])])
@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_the_part_of_a_vocabulary_that_is_probed_encodes_as_the_whole(tmp_path, split, ignore_merges, normalizer):
    import pydoc_data.topics

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[split])
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=alphabet, special_tokens=["<unk>", "<s>"], show_progress=False
    )
    texts = [PROBE[i : i + 90] for i in range(0, len(PROBE), 40)]  # so that many long tokens occur in the test text
    tokenizer.train_from_iterator([*texts, *texts, *list(pydoc_data.topics.topics.values())[:10]], trainer)
    tokenizer.add_tokens(["    ", "apple", " é ", "\t\t"])
    tokenizer.add_special_tokens(["'D", "Ġx"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(3)
    read = files(tmp_path, {"tokenizer.json": tokenizer.to_str().encode()})
    part = probe_tokenizer(read, added_tokens(read), merge_texts(read))
    tokenizer.no_truncation()
    assert part.get_vocab_size() < tokenizer.get_vocab_size()
    assert part.encode(PROBE).ids == tokenizer.encode(PROBE).ids
    assert {t.content: t.id for t in added_tokens(read).values()} == {
        t.content: i for i, t in tokenizer.get_added_tokens_decoder().items()
    }
    for text in ("    ", " é ", "'D", "Ġx"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert part.encode(text, add_special_tokens=False).ids == ids
        assert part.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids, skip_special_tokens=False)


def test_every_row_of_the_embedding_has_a_token(tmp_path, smollm_files):
    keys = vocabulary(files(tmp_path, smollm_files), {"vocab_size": 49160})
    tokens, types = keys["tokenizer.ggml.tokens"].data, keys["tokenizer.ggml.token_type"].data
    assert len(tokens) == len(types) == 49160
    assert tokens[49151:49154] == [tokens[49151], "[PAD49152]", "[PAD49153]"]
    assert types[:17] == [3] * 17
    assert set(types[17:49152]) == {1}
    assert set(types[49152:]) == {5}


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path, smollm_files, sentencepiece_model):
    problem = rejected(vocabulary, files(tmp_path / "a", smollm_files), {"vocab_size": 49000})
    assert problem.rule == "tokenizer"
    assert "the embedding has 49000 rows" in problem.message
    spm = files(tmp_path / "b", {"tokenizer.model": sentencepiece_model})
    assert "600 pieces, and the embedding has 500 rows" in rejected(vocabulary, spm, {"vocab_size": 500}).message


def test_added_tokens_of_the_config_count_as_in_transformers(tmp_path, smollm_files):
    from transformers import AutoTokenizer

    settings = json.loads(smollm_files["tokenizer_config.json"])
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    settings["added_tokens_decoder"] = {"49152": {"content": "<tool>", **flags, "special": False}}
    settings["extra_special_tokens"] = ["<|more|>"]
    read = files(tmp_path, smollm_files | {"tokenizer_config.json": settings})
    keys = vocabulary(read, {"vocab_size": 49160})
    assert keys["tokenizer.ggml.tokens"].data[49152:49155] == ["<tool>", "<|more|>", "[PAD49154]"]
    assert keys["tokenizer.ggml.token_type"].data[49152:49155] == [4, 3, 5]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.convert_tokens_to_ids(["<tool>", "<|more|>"]) == [49152, 49153]
    settings["added_tokens_decoder"] = {"49155": {"content": "<tool>", **flags, "special": False}}
    problem = rejected(vocabulary, files(tmp_path, {"tokenizer_config.json": settings}), {"vocab_size": 49160})
    assert problem.where.endswith("tokenizer_config.json")
    assert problem.message.startswith("'<tool>' has the id 49155 here; ")
    assert problem.message.endswith(" give it 49152")


def test_two_tokens_of_one_text_are_refused(tmp_path, spm_files):
    settings = json.loads(spm_files["tokenizer_config.json"])
    settings["added_tokens_decoder"]["603"] = {"content": "▁▁", "special": False}
    settings["added_tokens_decoder"]["604"] = {"content": "  ", "special": False}
    contents = {"tokenizer.model": spm_files["tokenizer.model"], "tokenizer_config.json": settings}
    assert "occur under several ids" in rejected(vocabulary, files(tmp_path, contents), CONFIG).message


@pytest.mark.parametrize(
    ("contents", "rule", "message"),
    [
        ({}, "tokenizer", "neither tokenizer.model nor tokenizer.json"),
        ({"tokenizer.json": b""}, "tokenizer", "an empty file"),
        ({"tokenizer.json": b"{"}, "tokenizer", "not JSON"),
        ({"tokenizer.json": b"[]"}, "tokenizer", "not JSON"),
        ({"tokenizer.json": b'{"model": {"merges": {}}}'}, "tokenizer", "`merges` is no list"),
        ({"tokenizer_config.json": b"[]"}, "tokenizer", "no JSON object"),
        ({"tokenizer.json": {"model": {"type": "Unigram", "vocab": []}}}, "tokenizer-kind", "type 'Unigram'"),
        (
            {"tokenizer.json": {"model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}},
            "tokenizer",
            "1 merges make what is no token",
        ),
        ({"tokenizer.model": b"\x80\x04pickle"}, "tokenizer", "not a SentencePiece model"),
        ({"merges.txt": b"\xff", "tokenizer_config.json": b"{"}, "tokenizer", "utf-8|EOF"),
    ],
)
def test_damaged_files_are_refused(tmp_path, contents, rule, message):
    problem = rejected(lambda: vocabulary(files(tmp_path, contents), CONFIG))
    assert problem.rule == rule
    assert re.search(message, problem.message)


def test_a_unigram_model_is_refused(tmp_path):
    import io

    import sentencepiece

    written = io.BytesIO()
    text = ["the quick brown fox jumps over the lazy dog"] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=written, vocab_size=30, model_type="unigram", minloglevel=2
    )
    problem = rejected(vocabulary, files(tmp_path, {"tokenizer.model": written.getvalue()}), CONFIG)
    assert (problem.rule, "kind unigram" in problem.message) == ("tokenizer-kind", True)


def test_code_llama_has_infill_tokens(tmp_path, sentencepiece_model):
    keys = vocabulary(files(tmp_path, {"tokenizer.model": sentencepiece_model}), {"vocab_size": 32016})
    found = {role: keys[f"tokenizer.ggml.{role}_token_id"].data for role in ("prefix", "suffix", "middle", "eot")}
    assert found == {"prefix": 32007, "suffix": 32008, "middle": 32009, "eot": 32010}
