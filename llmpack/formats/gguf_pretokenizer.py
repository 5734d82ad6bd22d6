"""Which of llama.cpp's built-in pre-tokenizers a BPE tokenizer uses.

A GGUF file does not hold the regular expressions that split text before byte-pair merging; it holds
a name, and llama.cpp knows the expressions behind each name. The name is found as llama.cpp's own
converter finds it: encode a fixed text, hash the list of ids, look the hash up. The hashes below are
those of https://github.com/ggml-org/llama.cpp (conversion/base.py), each with a model that has it.

A hash covers only what the text exercises, so the read-back compares token ids on a larger probe set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmpack.errors import InputRejected, Problem
from llmpack.formats.added_tokens import AddedToken
from llmpack.formats.tokenizer_files import TokenizerFiles

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, "
    "'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)

LONGEST = 64  # letters of a token; no run of the test text is longer

PRE_TOKENIZERS = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",  # meta-llama/Meta-Llama-3-8B
    "d353350c764d8c3b39c763113960e4fb4919bea5fbf208a0e3b22e8469dc7406": "llama4",  # meta-llama/Llama-4-Scout
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",  # abacusai/Smaug-Llama-3
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",  # HuggingFaceTB/SmolLM-135M
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",  # openai-community/gpt2
    "0fe1cf6eda062318a1af7270f3331a85c539a01778ff948e24388e949c5282f4": "gpt-2",  # evilfreelancer/ruGPT3XL
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",  # Xenova/gpt-4o
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",  # Qwen/Qwen1.5-7B
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",  # Qwen/Qwen3-Embedding-0.6B
    "d30d75d9059f1aa2c19359de71047b3ae408c70875e8a3ccf8c5fba56c9d8af4": "qwen35",  # Qwen/Qwen3.5-9B-Instruct
    "1444df51289cfa8063b96f0e62b1125440111bc79a52003ea14b6eac7016fd5f": "qwen35",  # openbmb/MiniCPM-V-4_6
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",  # mistralai/Mistral-Nemo-Base
    "0e9433cbbb161f89e264eb32e8e64bfe69e834973ffca5d41d3948a604a3e2a3": "pixtral",  # mistral-community/pixtral-12b
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",  # deepseek-llm-7b-base
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",  # deepseek-coder-6.7b
    "877081d19cf6996e2c4ff0e1236341e9b7bde288f5311a56a937f0afbbb3aeb5": "deepseek-v3",  # deepseek-ai/DeepSeek-V3
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",  # R1-Distill-Qwen
    "8aeee3860c56296a157a1fe2fad249ec40aa59b1bb5709f4ade11c4e6fe652ed": "falcon",  # tiiuae/falcon-7b
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",  # tiiuae/Falcon3-7B-Base
    "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34": "starcoder",  # bigcode/starcoder2-3b
    "6221ad2852e85ce96f791f476e0b390cf9b474c9e3d1362f53a24a06dc8220ff": "refact",  # smallcloudai/Refact-1_6-base
    "32d85c31273f8019248f2559fed492d929ea28b17e51d81d3bb36fff23ca72b3": "stablelm2",  # stablelm-2-zephyr-1_6b
    "9c2227e4dd922002fb81bde4fc02b0483ca4f12911410dee2255e4987644e3f8": "command-r",  # c4ai-command-r-v01
    "fcace8b9cac38ce847670c970cd5892031a753a1ef381abd1d9af00f713da085": "phi-2",  # microsoft/phi-2
    "1431a23e583c97432bc230bff598d103ddb5a1f89960c8f1d1051aaa944d0b35": "minerva-7b",  # Minerva-7B-base-v1.0
    "d5f1dd6f980fec569fb218a81a7658ac45fc56b38c5a0adeb1c232fbe04ef5ec": "seed-coder",  # Seed-Coder-8B-Base
    "a1e163ecab2e718a4c829d1148b6e86824ec36163bb71941c3dca9cd5ac25756": "mellum",  # JetBrains/Mellum-4b-base
    "1994ffd01900cfb37395608534236ecd63f2bd5995d6cb1004dda1af50240f15": "trillion",  # Trillion-7B-preview
    "4e2b24cc4770243d65a2c9ec19770a72f08cffc161adbb73fcbb6b7dd45a0aae": "exaone",  # EXAONE-3.0-7.8B-Instruct
    "169bf0296a13c4d9b7672313f749eb36501d931022de052aad6e36f2bf34dd51": "lfm2",  # LiquidAI/LFM2.5-350M
    "a1336059768a55c99a734006ffb02203cd450fed003e9a71886c88acf24fdbc2": "glm4",  # THUDM/glm-4-9b-hf
}


def fingerprint(ids: list[int]) -> str:
    """Hex sha256 of a list of token ids, as the table above spells it."""
    return hashlib.sha256(str(ids).encode()).hexdigest()


def probe_tokenizer(files: TokenizerFiles, added: Mapping[str, AddedToken], merges: Sequence[str]) -> Tokenizer:
    """The tokenizer of tokenizer.json with that part of its vocabulary which the test text can use.

    It splits the text, and encodes and decodes added tokens, as the whole one does, and takes a
    hundredth of the time and memory: a merge can only matter if what it makes occurs in the text.

    merges  as GGUF holds them, ``left right``

    Raises InputRejected (rule ``tokenizer``) for a file that the tokenizers library does not read.
    """
    whole: Mapping[str, Any] = files.tokenizer or {}
    model = whole["model"]
    empty = _tokenizer(
        files, {**whole, "added_tokens": [], "model": {**model, "vocab": {}, "merges": [], "unk_token": None}}
    )
    text = " " + (empty.normalizer.normalize_str(PROBE) if empty.normalizer is not None else PROBE)
    seen = _stretches("".join(_BYTE_LETTERS[byte] for byte in text.encode()))
    tokens = model["vocab"]
    vocab = {token: tokens[token] for token in sorted(seen.intersection(tokens))}
    if model.get("unk_token") in tokens:
        vocab[model["unk_token"]] = tokens[model["unk_token"]]
    kept = _kept_merges(files, merges, seen)
    vocab |= {token.content: token.id for token in added.values()}
    entries = [token.entry() for token in sorted(added.values(), key=lambda token: token.id)]
    return _tokenizer(files, {**whole, "added_tokens": entries, "model": {**model, "vocab": vocab, "merges": kept}})


def _kept_merges(files: TokenizerFiles, merges: Sequence[str], seen: set[str]) -> list[list[str]]:
    vocab = (files.tokenizer or {})["model"]["vocab"]
    made = [merge.replace(" ", "", 1) for merge in merges]
    kept = [merge.split(" ") for merge, token in zip(merges, made, strict=True) if token in seen]
    unknown = set(made).difference(vocab)
    lost = [m for m, t in zip(merges, made, strict=True) if t in unknown and t.replace("Ġ", " ") not in vocab]
    if lost:
        raise files.reject("tokenizer.json", f"{len(lost)} merges make what is no token (first: {lost[0][:60]!r})")
    return kept


def _stretches(text: str) -> set[str]:
    """Every part of a text that a token could be."""
    return {text[i : i + n] for i in range(len(text)) for n in range(1, min(LONGEST, len(text) - i) + 1)}


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level BPE: itself where it prints, else one from U+0100 on."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printing else chr(next(others)) for byte in range(256)]


_BYTE_LETTERS = _byte_letters()


def _tokenizer(files: TokenizerFiles, content: Mapping[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(json.dumps({**content, "truncation": None, "padding": None}))
    except Exception as fault:
        if type(fault) is not Exception:  # the Rust side raises exactly this class, never a narrower one
            raise
        raise files.reject("tokenizer.json", f"the tokenizers library does not read it: {fault}") from fault
    return tokenizer


def pre_tokenizer(tokenizer: Tokenizer, bos: int | None, where: str) -> str:
    """The name under which llama.cpp knows how `tokenizer` splits text.

    bos    id of the token that opens a sequence, None where there is none. The published hashes
           include what each original tokenizer adds by itself; re-saved tokenizers often add
           nothing, or add it although the original did not, and split text no differently.
    where  the file, for messages

    Raises InputRejected (rule ``pre-tokenizer``) for a hash that is not in the table, and (rule
    ``tokenizer-timeout``) for a regular expression that does not come to an end.
    """
    hashes = []
    for ids in _encodings(tokenizer, bos, where):
        hashes.append(fingerprint(ids))
        if hashes[-1] in PRE_TOKENIZERS:
            return PRE_TOKENIZERS[hashes[-1]]
    raise InputRejected(
        [
            Problem(
                f"this BPE tokenizer splits text in none of the {len(set(PRE_TOKENIZERS.values()))} ways that llmpack "
                f"knows in llama.cpp (check hash {hashes[0]}); a guess would give other token ids at run time. If "
                "llama.cpp's convert_hf_to_gguf.py knows the hash, add it to llmpack/formats/gguf_pretokenizer.py; "
                "if not, llama.cpp cannot run this tokenizer",
                where=where,
                rule="pre-tokenizer",
            )
        ]
    )


def _encodings(tokenizer: Tokenizer, bos: int | None, where: str) -> Iterator[list[int]]:
    try:
        yield list(tokenizer.encode(PROBE).ids)
        bare = list(tokenizer.encode(PROBE, add_special_tokens=False).ids)
    except BaseException as stop:
        # The Rust side reports an exhausted regular expression as a panic, which is no Exception.
        if type(stop).__name__ != "PanicException":
            raise
        raise InputRejected(
            [Problem(f"the tokenizer cannot split a test text: {stop}", where=where, rule="tokenizer-timeout")]
        ) from None
    yield bare
    if bos is not None:
        yield [bos, *bare]
