"""Checkpoints with the tokenizers that matter to GGUF: SmolLM2's own, and SentencePiece trained on the spot."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from family_zoo import CONFIGS, TOKENIZERS

from llmpack.runtime.llama import LlamaRuntime

PIECES, ROWS = 600, 608
ADDED = {600: ("<|user|>", True), 601: ("<|end|>", True), 602: ("[TOOL]", False)}
SPM_TEMPLATE = "{% for m in messages %}<|user|>{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def smollm_files(demo_gguf: Path) -> dict[str, bytes]:
    """SmolLM2's tokenizer files, as the demo model's GGUF holds them."""
    from llmpack.checkpoint.gguf_file import GgufFile
    from llmpack.models.gguf_tokenizer import tokenizer_files

    return tokenizer_files(GgufFile.open(demo_gguf).metadata)


@pytest.fixture(scope="session")
def smollm(checkpoint_factory: Make, smollm_files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama of two narrow blocks with SmolLM2's vocabulary."""
    made = checkpoint_factory(tokenizer=None, vocab_size=49152, hidden_size=32, intermediate_size=64)
    folder = tmp_path_factory.mktemp("smollm") / "SmolLM2-Tiny-Instruct"
    shutil.copytree(made, folder)
    for name, content in smollm_files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def sentencepiece_model() -> bytes:
    """A SentencePiece BPE model with byte fallback, as Llama 2's is made."""
    import pydoc_data.topics

    import sentencepiece

    topics = pydoc_data.topics.topics
    lines = [line for name in sorted(topics)[:30] for line in topics[name].splitlines() if line.strip()]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        vocab_size=PIECES,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.999,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return written.getvalue()


def added_token(content: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {"content": content, **flags, "special": special}


@pytest.fixture(scope="session")
def spm_files(sentencepiece_model: bytes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """tokenizer.model, with the tokenizer.json and tokenizer_config.json that Llama 2 has beside it."""
    from transformers import LlamaTokenizer

    folder = tmp_path_factory.mktemp("spm")
    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    for content, special in ADDED.values():
        tokenizer.add_tokens([content], special_tokens=special)
    tokenizer.save_pretrained(folder)
    named = {0: ("<unk>", True), 1: ("<s>", True), 2: ("</s>", True), **ADDED}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): added_token(*token) for i, token in named.items()},
        "bos_token": {"__type": "AddedToken", **added_token("<s>", True)},
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
        "chat_template": SPM_TEMPLATE,
    }
    files = {name: (folder / name).read_bytes() for name in ("tokenizer.model", "tokenizer.json")}
    return {**files, "tokenizer_config.json": json.dumps(settings).encode()}


@pytest.fixture(scope="session")
def with_files(checkpoint_factory: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes a checkpoint under a name of its own, with these files beside the weights."""

    def make(name: str, files: dict[str, bytes], **config: Any) -> Path:
        made = checkpoint_factory(tokenizer=None, vocab_size=ROWS, **config)
        folder = tmp_path_factory.mktemp("named") / name
        shutil.copytree(made, folder)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        return folder

    return make


@pytest.fixture(scope="session")
def spm_llama(with_files: Make, spm_files: dict[str, bytes]) -> Path:
    """A Llama 3.1 with a SentencePiece vocabulary: untied, grouped heads, scaled positions, bf16, in three shards."""
    card = """---
license: other
license_name: tiny-licence
license_link: https://example.org/licence
language:
- en
- no
base_model: acme-labs/Grand-7B-Chat-v0.1
datasets: [acme/words]
tags: [a, b]
pipeline_tag: text-generation
---
"""
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 40}
    others = {"README.md": card.encode(), "generation_config.json": json.dumps(sampling).encode()}
    return with_files(
        "Tiny-Llama-7B-Chat-v1.0",
        spm_files | others,
        shards=3,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
        rope_theta=500000.0,
        rope_scaling=LLAMA3_ROPE,
        max_position_embeddings=131072,
    )


@pytest.fixture(scope="session")
def spm_mistral(with_files: Make, sentencepiece_model: bytes) -> Path:
    """A Mistral, f16, with nothing beside tokenizer.model."""
    return with_files(
        "mistral",
        {"tokenizer.model": sentencepiece_model},
        architectures=["MistralForCausalLM"],
        model_type="mistral",
        sliding_window=None,
        tie_word_embeddings=False,
        torch_dtype="float16",
        head_dim=32,
    )


@pytest.fixture(scope="session")
def json_llama(with_files: Make, spm_files: dict[str, bytes]) -> Path:
    """The SentencePiece vocabulary in tokenizer.json alone, without scores."""
    files = {name: content for name, content in spm_files.items() if name != "tokenizer.model"}
    return with_files("json-only", files, num_key_value_heads=4)


@pytest.fixture(scope="session")
def silent_llama(with_files: Make, spm_files: dict[str, bytes]) -> Path:
    """A SentencePiece vocabulary whose files do not say whether a text begins with BOS."""
    settings = json.loads(spm_files["tokenizer_config.json"])
    del settings["add_bos_token"]
    return with_files("silent", spm_files | {"tokenizer_config.json": json.dumps(settings).encode()})


@pytest.fixture(scope="session")
def tokenizer_kinds(smollm_files: dict[str, bytes], spm_files: dict[str, bytes]) -> dict[str, dict[str, bytes]]:
    """Tokenizer files by kind. All of them state a space before texts, which only some families heed."""

    def stating(files: dict[str, bytes], prefix: bool) -> dict[str, bytes]:
        settings = json.loads(files["tokenizer_config.json"]) | {"add_prefix_space": prefix}
        return files | {"tokenizer_config.json": json.dumps(settings).encode()}

    spm = stating(spm_files, True)
    gemma = json.loads(spm["tokenizer.json"])
    gemma["pre_tokenizer"]["prepend_scheme"] = "never"
    gemma["decoder"]["decoders"].pop()  # strips the space that was put before
    phi = json.loads(spm["tokenizer.json"])
    for index, content, special in ((603, "<|endoftext|>", True), (604, "<|tool|>", False)):
        phi["added_tokens"].append({"id": index, **added_token(content, special)})
    return {
        "smollm": stating(smollm_files, False),
        "spm": spm,
        "gemma": spm | {"tokenizer.json": json.dumps(gemma).encode()},
        "phi": spm | {"tokenizer.json": json.dumps(phi).encode()},
    }


@pytest.fixture(scope="session")
def make_family(
    checkpoint_factory: Make, tokenizer_kinds: dict[str, dict[str, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> Make:
    """Makes the checkpoint of a family in the zoo, with changes to its config."""

    def make(name: str, tokenizer: str | None = None, **changes: Any) -> Path:
        kind = tokenizer or TOKENIZERS[name]
        size = 49216 if kind == "smollm" else ROWS
        made = checkpoint_factory(tokenizer=None, vocab_size=size, **CONFIGS[name] | changes)
        # llama.cpp treats special tokens otherwise where a model's name has "phi3" in it
        folder = tmp_path_factory.mktemp("family") / name.replace("phi3", "phi")
        shutil.copytree(made, folder)
        for file, content in tokenizer_kinds[kind].items():
            (folder / file).write_bytes(content)
        return folder

    return make


@pytest.fixture(scope="session")
def runtime() -> Iterator[LlamaRuntime]:
    """One child for many models."""
    if find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    with LlamaRuntime() as started:
        yield started
