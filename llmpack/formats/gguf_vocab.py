"""From a checkpoint's tokenizer files to the vocabulary of a GGUF file.

Three kinds, told apart as llama.cpp's converter tells them for the Llama architectures
(conversion/llama.py at https://github.com/ggml-org/llama.cpp):

    tokenizer.model                              SentencePiece: pieces, scores, byte tokens
    tokenizer.json, BPE with byte fallback       the same vocabulary without its model file
    tokenizer.json, BPE over bytes               GPT-2 style: tokens, merges, a pre-tokenizer's name

Every row of the embedding gets a token: rows that the tokenizer does not know are padded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from llmpack.errors import InputRejected, Problem
from llmpack.formats.added_tokens import added_tokens
from llmpack.formats.gguf_container import Value, boolean, float32s, int32s, string, strings, uint32
from llmpack.formats.gguf_pretokenizer import pre_tokenizer, probe_tokenizer
from llmpack.formats.gguf_special import FLAG_KEYS, merge_texts, special_keys
from llmpack.formats.sentencepiece_model import ModelKind, PieceType, SentencePieceModel
from llmpack.formats.tokenizer_files import TokenizerFiles
from llmpack.models.tables import TokenizerRules

UNKNOWN_SCORE = -1000.0  # of a token that no SentencePiece model scored
PAD_SCORE = -10000.0
CODE_LLAMA_SIZE = 32016
USUAL_RULES = TokenizerRules()
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)
_SPACE_PREFIX = "tokenizer.ggml.add_space_prefix"
_TOKENS, _SCORES, _TYPES = (f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type"))


def vocabulary(
    files: TokenizerFiles, config: Mapping[str, Any], rules: TokenizerRules = USUAL_RULES
) -> dict[str, Value]:
    """The ``tokenizer.*`` keys, in file order.

    config  the checkpoint's config.json; `vocab_size` is the number of rows of the embedding
    rules   what is special about the family

    Raises InputRejected for a tokenizer that llama.cpp does not know (rules ``pre-tokenizer`` and
    ``tokenizer-kind``) or that contradicts itself or the embedding (rule ``tokenizer``).
    """
    size = config["vocab_size"]
    keys: dict[str, Value] = {}
    prefix = (files.config or {}).get("add_prefix_space")
    if rules.space_prefix == "configured" and isinstance(prefix, bool):
        keys[_SPACE_PREFIX] = boolean(prefix)
    if files.sentencepiece is not None:
        keys |= _sentencepiece(files, files.sentencepiece, size, rules)
        keys |= special_keys(files, config, size, merges=False)
    else:
        model = _bpe_model(files)
        if model.get("byte_fallback") and ((files.tokenizer or {}).get("decoder") or {}).get("type") == "Sequence":
            keys |= _byte_fallback(files, model, size)
            keys |= special_keys(files, config, size, merges=False)
        else:
            special = special_keys(files, config, size, merges=True)
            keys |= _byte_level(files, model, size, special)
            keys |= special
    if rules.space_prefix == "never" and keys["tokenizer.ggml.model"].data == "llama":
        keys[_SPACE_PREFIX] = boolean(False)
    if size == CODE_LLAMA_SIZE:
        infill = {"prefix": 32007, "suffix": 32008, "middle": 32009, "eot": 32010}
        keys |= {f"tokenizer.ggml.{role}_token_id": uint32(number) for role, number in infill.items()}
    if files.tokenizer is not None:
        # The file says that nothing is added by saying nothing; llama.cpp would go by the kind of vocabulary.
        keys.setdefault(FLAG_KEYS["bos"], boolean(False))
    return keys


class _Slots:
    """One slot per row of the embedding; those that no token takes are padded."""

    def __init__(self, files: TokenizerFiles, size: int) -> None:
        self.files = files
        self.tokens: list[str | None] = [None] * size
        self.scores = [PAD_SCORE] * size
        self.types = [int(PieceType.UNUSED)] * size

    def put(self, index: int, token: str, kind: int, score: float = UNKNOWN_SCORE) -> None:
        if not 0 <= index < len(self.tokens):
            message = f"token {token!r} has the id {index}, and the embedding has {len(self.tokens)} rows"
            raise self.files.reject("tokenizer.json", message)
        self.tokens[index], self.types[index], self.scores[index] = token, kind, score

    def put_normal(self, vocabulary: Mapping[str, int]) -> None:
        """Every token of a table {token: id}: `put` of all of them, without a call for each."""
        if vocabulary and not (min(vocabulary.values()) >= 0 and max(vocabulary.values()) < len(self.tokens)):
            for token, index in vocabulary.items():
                self.put(index, token, PieceType.NORMAL)
        tokens, types, normal = self.tokens, self.types, int(PieceType.NORMAL)
        for token, index in vocabulary.items():
            tokens[index] = token
            types[index] = normal

    def put_added(self, index: int, token: str, special: bool) -> None:
        """A token that is cut out of the text before anything else; llama.cpp expects its spaces as spaces."""
        if special or _LOOKS_SPECIAL.fullmatch(token):
            self.put(index, token, PieceType.CONTROL)
        else:
            self.put(index, token.replace("▁", " "), PieceType.USER_DEFINED)

    def keys(self, head: Mapping[str, Value], *, scores: bool) -> dict[str, Value]:
        tokens = [f"[PAD{i}]" if token is None else token for i, token in enumerate(self.tokens)]
        if len(set(tokens)) < len(tokens):
            twice = [token for token, count in Counter(tokens).items() if count > 1]
            message = f"{len(twice)} tokens occur under several ids, which llama.cpp does not load: {twice[:5]}"
            raise self.files.reject("tokenizer.json", message)
        found = {**head, _TOKENS: strings(tokens)}
        if scores:
            found[_SCORES] = float32s(self.scores)
        return found | {_TYPES: int32s([int(kind) for kind in self.types])}


def _sentencepiece(files: TokenizerFiles, data: bytes, size: int, rules: TokenizerRules) -> dict[str, Value]:
    where = str(files.folder / "tokenizer.model")
    model = SentencePieceModel.parse(data, where)
    if model.kind is not ModelKind.BPE:
        message = f"a SentencePiece model of kind {model.kind.name.lower()}; llama.cpp merges by score, as bpe does"
        raise InputRejected([Problem(message, where=where, rule="tokenizer-kind")])
    if len(model.pieces) > size:
        message = f"{len(model.pieces)} pieces, and the embedding has {size} rows; the tokenizer is of another model"
        raise files.reject("tokenizer.model", message)
    slots = _Slots(files, size)
    for index, piece in enumerate(model.pieces):
        kind = PieceType.NORMAL if piece.type is PieceType.USER_DEFINED else piece.type
        slots.put(index, piece.text, kind, piece.score)
    for token, index in files.added.items():
        slots.put(index, token, PieceType.USER_DEFINED)
    added = {int(index): entry for index, entry in ((files.config or {}).get("added_tokens_decoder") or {}).items()}
    if rules.added_as_stated:
        added |= {int(entry["id"]): entry for entry in (files.tokenizer or {}).get("added_tokens") or ()}
    for index, entry in added.items():
        if not rules.added_as_stated:
            slots.put_added(index, entry["content"], bool(entry.get("special")))
        else:
            slots.put(index, entry["content"], PieceType.CONTROL if entry.get("special") else PieceType.USER_DEFINED)
    return slots.keys({"tokenizer.ggml.model": string("llama"), "tokenizer.ggml.pre": string("default")}, scores=True)


def _bpe_model(files: TokenizerFiles) -> Mapping[str, Any]:
    if files.tokenizer is None:
        message = "neither tokenizer.model nor tokenizer.json is here; save the tokenizer with transformers"
        raise files.reject("", message)
    model: Mapping[str, Any] = files.tokenizer.get("model") or {}
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        message = f"a tokenizer of type {model.get('type')!r}; supported are BPE and SentencePiece"
        where = str(files.folder / "tokenizer.json")
        raise InputRejected([Problem(message, where=where, rule="tokenizer-kind")])
    return model


def _byte_fallback(files: TokenizerFiles, model: Mapping[str, Any], size: int) -> dict[str, Value]:
    """SentencePiece's vocabulary as tokenizer.json holds it.

    The scores are gone; the order of the merges has the same meaning, so each piece scores minus the
    rank of the first merge that makes it. The converter writes one score for all pieces, with which
    llama.cpp merges from left to right and finds other tokens.
    """
    scores: dict[str, float] = {}
    for rank, text in enumerate(merge_texts(files)):
        scores.setdefault(text.replace(" ", "", 1), -float(rank))
    slots = _Slots(files, size)
    unknown = model.get("unk_token")
    for token, index in model["vocab"].items():
        kind = PieceType.BYTE if _BYTE.fullmatch(token) else PieceType.NORMAL
        slots.put(index, token, PieceType.UNKNOWN if token == unknown else kind, scores.get(token, UNKNOWN_SCORE))
    for added in added_tokens(files).values():
        if added.content != unknown:
            slots.put_added(added.id, added.content, added.special)
    return slots.keys({"tokenizer.ggml.model": string("llama"), "tokenizer.ggml.pre": string("default")}, scores=True)


def _byte_level(
    files: TokenizerFiles, model: Mapping[str, Any], size: int, special: Mapping[str, Value]
) -> dict[str, Value]:
    slots = _Slots(files, size)
    slots.put_normal(model["vocab"])
    added = added_tokens(files)
    tokenizer = probe_tokenizer(files, added, special["tokenizer.ggml.merges"].data)
    for token in added.values():
        text = token.content
        if not token.is_normalized:
            # llama.cpp matches these before normalizing, so it needs what comes out of encoding and decoding.
            text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
        slots.put_added(token.id, text, token.special)
    bos = special.get("tokenizer.ggml.bos_token_id")
    name = pre_tokenizer(tokenizer, None if bos is None else bos.data, str(files.folder / "tokenizer.json"))
    return slots.keys({"tokenizer.ggml.model": string("gpt2"), "tokenizer.ggml.pre": string(name)}, scores=False)
