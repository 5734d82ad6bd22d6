"""The checkpoint's own tokenizer: what the runtime's token ids are compared with.

For byte-level BPE that is transformers' tokenizer. For vocabularies of SentencePiece it is the
SentencePiece algorithm, between special tokens one stretch of text after the other, which is how
these models were trained to see text and what llama.cpp does. transformers differs in two places,
by version and settings: it adds no second space before text that begins with one, and no space after
special tokens. Where it does, the read-back says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from llmpack.calibration.corpus import load_tokenizer
from llmpack.errors import LlmpackError
from llmpack.formats.gguf_container import Value
from llmpack.formats.probes import Message
from llmpack.formats.sentencepiece_model import PieceType
from llmpack.formats.tokenizer_files import TokenizerFiles

if TYPE_CHECKING:
    import jinja2
    import sentencepiece

    from llmpack.checkpoint.checkpoint import Checkpoint
else:
    from llmpack.lazy import LazyModule

    jinja2 = LazyModule("jinja2")
    sentencepiece = LazyModule("sentencepiece")


_NO_DUMMY_PREFIX = bytes((3 << 3 | 2, 2, 3 << 3, 0))  # normalizer_spec { add_dummy_prefix: false }


class TemplateRefusedError(LlmpackError):
    """A chat template does not take a conversation, such as one with a system message."""

    exit_code = 8


class CheckpointTokenizer:
    """Token ids and renderings of a checkpoint, as transformers finds them.

    special  id by text of the tokens that stand for something else than text
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.theirs = load_tokenizer(checkpoint)
        self.special = {str(token): i for i, token in self.theirs.added_tokens_decoder.items() if token.special}

    @property
    def by_stretches(self) -> bool:
        """True where a runtime splits text at special tokens, and transformers may not."""
        return False

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Expected ids.

        add_special    with the tokens that stand around every text
        parse_special  read special tokens in the text as such
        """
        return self.transformers_ids(text, add_special=add_special, parse_special=parse_special)

    def transformers_ids(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Ids as transformers finds them."""
        found: Any = self.theirs(text, add_special_tokens=add_special, split_special_tokens=not parse_special)
        return list(found["input_ids"])

    @property
    def has_template(self) -> bool:
        """True if there is a chat template that is used unasked."""
        template = self.theirs.chat_template
        return "default" in template if isinstance(template, dict) else template is not None

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation under the chat template, with the opening of an answer. Raises TemplateRefusedError."""
        try:
            conversation = [dict(message) for message in messages]
            return str(self.theirs.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as refusal:
            raise TemplateRefusedError(f"{type(refusal).__name__}: {refusal}") from refusal


class ReferenceTokenizer(CheckpointTokenizer):
    """Expected token ids and renderings of a checkpoint in llama.cpp.

    keys  the ``tokenizer.*`` keys of its GGUF file: token texts and types, special ids, flags
    """

    def __init__(self, checkpoint: Checkpoint, keys: dict[str, Value]) -> None:
        super().__init__(checkpoint)
        tokens, types = keys["tokenizer.ggml.tokens"].data, keys["tokenizer.ggml.token_type"].data
        self.special = {t: i for i, t in enumerate(tokens) if types[i] == PieceType.CONTROL}
        self._defined = {t: i for i, t in enumerate(tokens) if types[i] == PieceType.USER_DEFINED}
        flag, bos = keys.get("tokenizer.ggml.add_bos_token"), keys.get("tokenizer.ggml.bos_token_id")
        self._opening = [bos.data] if bos is not None and (flag is None or flag.data) else []
        self._stretch: Callable[[str], Sequence[int]] | None = None
        if keys["tokenizer.ggml.model"].data == "llama":
            files = TokenizerFiles.read(checkpoint.folder, checkpoint.tokenizer_files)
            prefix = keys.get("tokenizer.ggml.add_space_prefix")
            self._stretch = _stretch_encoder(files, prefix is None or prefix.data)

    @property
    def by_stretches(self) -> bool:
        """True for vocabularies of SentencePiece."""
        return self._stretch is not None

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Expected ids.

        add_special    with the tokens that stand around every text
        parse_special  read special tokens in the text as such
        """
        if self._stretch is None:
            return self.transformers_ids(text, add_special=add_special, parse_special=parse_special)
        known = {**self._defined, **(self.special if parse_special else {})}
        ids = list(self._opening) if add_special else []
        at = 0
        longest_first = sorted(filter(None, known), key=len, reverse=True)
        for match in re.finditer("|".join(map(re.escape, longest_first)), text) if longest_first else ():
            ids += self._stretch(text[at : match.start()]) if match.start() > at else []
            ids.append(known[match[0]])
            at = match.end()
        return ids + list(self._stretch(text[at:]) if at < len(text) else [])


def _stretch_encoder(files: TokenizerFiles, prefix: bool) -> Callable[[str], Sequence[int]]:
    """Ids of a text without special tokens, by SentencePiece's rules: spaces as ``▁``, one before it with `prefix`."""
    if files.sentencepiece is not None:
        # Messages that follow each other are one message: the setting in the file is overruled, not edited.
        proto = files.sentencepiece + (b"" if prefix else _NO_DUMMY_PREFIX)
        model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        return lambda text: list(model.encode(text))
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    whole = dict(files.tokenizer or {})
    bare = {
        **whole,
        "model": {**whole["model"], "merges": list(chain.from_iterable(files.merge_batches()))},
        "added_tokens": [],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, escape] if prefix else [escape],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
    tokenizer = Tokenizer.from_str(json.dumps(bare))
    return lambda text: tokenizer.encode(text).ids
