"""From the vocabulary in a GGUF file to the tokenizer files of a checkpoint.

A GGUF file holds tokens, scores, merges and the *name* of the way in which llama.cpp splits text before merging;
a checkpoint holds all of it as rules in tokenizer.json. The table below says what each name means, as llama.cpp
(src/llama-vocab.cpp at https://github.com/ggml-org/llama.cpp) has it built in. A name that is not in the
table is refused: a guess would give other token ids.

transformers has such a conversion too. It knows neither SmolLM's way (digits one by one) nor what a file leaves
to llama.cpp's defaults, and it reads files by path that are checked here already.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from llmpack.errors import InputRejected, Problem

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
"""Roles of special tokens and how GGUF spells them."""

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Split:
    """How text is split before byte-level merging.

    pattern        expression whose matches are the parts; None for GPT-2's, which tokenizers has built in
    digits         every digit is a part of its own
    ignore_merges  a part that is a token as a whole is not merged
    bos            texts begin with the BOS token unless the file says otherwise
    """

    pattern: str | None = None
    digits: bool = False
    ignore_merges: bool = False
    bos: bool = False


_LLAMA3 = Split(LLAMA3, ignore_merges=True, bos=True)
SPLITS = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo"), Split()),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), Split(digits=True)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), Split(QWEN2)),
    "tekken": Split(TEKKEN, ignore_merges=True, bos=True),
}


def tokenizer_files(metadata: Mapping[str, Any], where: str = "") -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and generation_config.json, by name.

    metadata  of a checked GGUF file
    where     the file, for messages

    Raises InputRejected for a kind of tokenizer (``tokenizer-kind``) or a way to split text (``pre-tokenizer``)
    that is not known here, and for a vocabulary that contradicts itself (``tokenizer``).
    """
    vocabulary = _Vocabulary(metadata, where)
    kind = vocabulary.get("model")
    if kind == "gpt2":
        tokenizer, bos = _byte_level(vocabulary)
    elif kind == "llama":
        tokenizer, bos = _sentencepiece(vocabulary), True
    else:
        raise vocabulary.reject("tokenizer-kind", f"tokenizer.ggml.model is {kind!r}; supported: gpt2, llama")
    bos, eos = bool(vocabulary.get("add_bos_token", bos)), bool(vocabulary.get("add_eos_token", False))
    _add_special(tokenizer, vocabulary)
    template = ["$A"]
    if bos:
        template.insert(0, vocabulary.role("bos"))
    if eos:
        template.append(vocabulary.role("eos"))
    if bos or eos:
        marks = [(token, vocabulary.ids[token]) for token in template if token != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=marks)
    settings = _settings(vocabulary, bos, eos)
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode(),
        "generation_config.json": (json.dumps(_generation(vocabulary), indent=2) + "\n").encode(),
    }


class _Vocabulary:
    """The ``tokenizer.*`` keys of a file."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self.metadata, self.where = metadata, where
        tokens = self.get("tokens")
        if tokens is None:
            raise self.reject("tokenizer", "there is no vocabulary in this file (tokenizer.ggml.tokens)")
        self.tokens: list[str] = list(tokens)
        types = self.get("token_type")
        self.types: Sequence[int] = [NORMAL] * len(self.tokens) if types is None else [int(kind) for kind in types]
        self.ids = {token: index for index, token in enumerate(self.tokens) if self.types[index] != UNUSED}

    def get(self, name: str, default: Any = None) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{name}", default)

    def reject(self, rule: str, message: str) -> InputRejected:
        return InputRejected([Problem(message, where=self.where, rule=rule)])

    def role(self, name: str) -> str:
        """The token of a role. Raises InputRejected where the file names none, or one that does not exist."""
        index = self.get(f"{ROLES[name]}_token_id")
        if not isinstance(index, int) or not 0 <= index < len(self.tokens):
            text = f"tokenizer.ggml.{ROLES[name]}_token_id is {index}, and there are {len(self.tokens)} tokens"
            raise self.reject("tokenizer", text)
        return self.tokens[index]

    def roles(self) -> dict[str, str]:
        """Every role that the file fills."""
        return {name: self.role(name) for name in ROLES if self.get(f"{ROLES[name]}_token_id") is not None}

    def of_type(self, kind: int) -> list[str]:
        return [token for token, found in zip(self.tokens, self.types, strict=True) if found == kind]


def _bpe(vocabulary: _Vocabulary, merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
    lost = [f"{left} {right}" for left, right in merges if not {left, right, left + right} <= vocabulary.ids.keys()]
    if lost:
        text = f"{len(lost)} merges make or use texts that are no tokens (first: {lost[0][:60]!r})"
        raise vocabulary.reject("tokenizer", text)
    return Tokenizer(models.BPE(vocab=vocabulary.ids, merges=merges, **options))


def _byte_level(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    """Byte-level BPE, and whether texts begin with BOS by default."""
    name = vocabulary.get("pre", "default")
    if name not in SPLITS:
        known = ", ".join(SPLITS)
        text = f"tokenizer.ggml.pre is {name!r}, and how that splits text is not known here; known: {known}"
        raise vocabulary.reject("pre-tokenizer", text)
    split = SPLITS[name]
    merges = []
    for merge in vocabulary.get("merges", ()):
        cut = merge.find(" ", 1)
        if cut < 0:
            raise vocabulary.reject("tokenizer", f"the merge {merge[:60]!r} is not two texts with a space between")
        merges.append((merge[:cut], merge[cut + 1 :]))
    tokenizer = _bpe(vocabulary, merges, ignore_merges=split.ignore_merges)
    parts: list[pre_tokenizers.PreTokenizer] = []
    if split.digits:
        parts.append(pre_tokenizers.Digits(individual_digits=True))
    if split.pattern is not None:
        parts.append(pre_tokenizers.Split(Regex(split.pattern), "isolated"))
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split.bos


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    """SentencePiece's BPE: the pair that makes the piece with the best score is merged first."""
    scores = vocabulary.get("scores")
    if scores is None:
        raise vocabulary.reject("tokenizer", "a SentencePiece vocabulary has scores (tokenizer.ggml.scores)")
    ranked = []
    for index, piece in enumerate(vocabulary.tokens):
        if vocabulary.types[index] not in (NORMAL, USER_DEFINED):
            continue
        pairs = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        found = [(left, right) for left, right in pairs if left in vocabulary.ids and right in vocabulary.ids]
        found.sort(key=lambda pair: (vocabulary.ids[pair[0]], vocabulary.ids[pair[1]]))
        ranked += [(-float(scores[index]), pair) for pair in found]
    ranked.sort(key=lambda entry: entry[0])
    unknown = next(iter(vocabulary.of_type(UNKNOWN)), None)
    tokenizer = _bpe(vocabulary, [pair for _, pair in ranked], byte_fallback=True, fuse_unk=True, unk_token=unknown)
    escape = normalizers.Replace(" ", "▁")
    prefix = bool(vocabulary.get("add_space_prefix", True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), escape]) if prefix else escape
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if prefix else undo)
    return tokenizer


def _add_special(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Tokens that are cut out of the text before anything else."""
    special = {*vocabulary.of_type(CONTROL), *vocabulary.of_type(UNKNOWN), *vocabulary.roles().values()}
    ordered = [token for token in vocabulary.tokens if token in special]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ordered])
    plain = [token for token in vocabulary.of_type(USER_DEFINED) if token not in special]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])


def _settings(vocabulary: _Vocabulary, bos: bool, eos: bool) -> dict[str, Any]:
    """tokenizer_config.json."""
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bos,
        "add_eos_token": eos,
        "clean_up_tokenization_spaces": False,
    }
    prefix = vocabulary.get("add_space_prefix")
    if prefix is not None:
        settings["add_prefix_space"] = bool(prefix)
    settings |= {f"{name}_token": token for name, token in vocabulary.roles().items()}
    template = vocabulary.metadata.get("tokenizer.chat_template")
    names = vocabulary.metadata.get("tokenizer.chat_templates")
    if names is not None:
        named = [{"name": n, "template": vocabulary.metadata[f"tokenizer.chat_template.{n}"]} for n in names]
        settings["chat_template"] = ([{"name": "default", "template": template}] if template else []) + named
    elif template is not None:
        settings["chat_template"] = template
    return settings


def _generation(vocabulary: _Vocabulary) -> dict[str, Any]:
    """generation_config.json: llama.cpp also ends a turn at ``eot`` and ``eom``."""
    ends = [vocabulary.get(f"{name}_token_id") for name in ("eos", "eot", "eom")]
    known = list(dict.fromkeys(index for index in ends if index is not None))
    settings = {"bos_token_id": vocabulary.get("bos_token_id"), "pad_token_id": vocabulary.get("padding_token_id")}
    if known:
        settings["eos_token_id"] = known[0] if len(known) == 1 else known
    return {key: value for key, value in settings.items() if value is not None}
