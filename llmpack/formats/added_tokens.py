"""Tokens beside the vocabulary proper: those that are cut out of a text before anything else.

tokenizer.json lists them, and tokenizer_config.json may change their flags, add more, or name special
tokens that are in no list. The ids follow the rules of the tokenizers library, by which transformers
adds them: a text that the vocabulary has keeps its id, any other gets the next free one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmpack.formats.gguf_special import ROLES
from llmpack.formats.tokenizer_files import LARGE, TokenizerFiles

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class AddedToken:
    """One of them.

    special     stands for something else than text
    normalized  is looked for after the text was normalized; None where it is not said (then: unless special)
    """

    content: str
    id: int
    special: bool = False
    normalized: bool | None = None
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False

    @property
    def is_normalized(self) -> bool:
        """`normalized`, with its default."""
        return not self.special if self.normalized is None else self.normalized

    def entry(self) -> dict[str, Any]:
        """As tokenizer.json lists it."""
        plain = {name: getattr(self, name) for name in _FLAGS if name != "normalized"}
        return {"id": self.id, "content": self.content, **plain, "normalized": self.is_normalized}


def added_tokens(files: TokenizerFiles) -> dict[str, AddedToken]:
    """The added tokens of a checkpoint with a tokenizer.json, by text.

    Raises InputRejected (rule ``tokenizer``) for entries that contradict the vocabulary or each other.
    """
    tokenizer = files.tokenizer or {}
    vocab: Mapping[str, int] = tokenizer["model"]["vocab"]
    found: dict[str, AddedToken] = {}

    def add(entry: Mapping[str, Any], where: str, *, special: bool | None = None) -> None:
        content, stated = entry["content"], entry.get("id")
        known = found[content].id if content in found else vocab.get(content)
        number = known if known is not None else _next_id(vocab, found)
        if stated is not None and stated != number:
            message = f"{content!r} has the id {stated} here; the vocabulary and the tokens before it give it {number}"
            raise files.reject(where, message)
        flags = {name: bool(entry[name]) for name in _FLAGS if name in entry}
        found[content] = AddedToken(content, number, **(flags | ({} if special is None else {"special": special})))

    for entry in tokenizer.get("added_tokens") or ():
        add(entry, LARGE)
    listed = (files.config or {}).get("added_tokens_decoder") or {}
    for number, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        add({**entry, "id": int(number)}, _CONFIG)
    for entry in _named(files.config or {}):
        if entry["content"] not in found:
            add(entry, _CONFIG, special=True)
    return found


def _next_id(vocab: Mapping[str, int], found: Mapping[str, AddedToken]) -> int:
    return max(len(vocab), 1 + max((token.id for token in found.values()), default=-1))


def _named(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What tokenizer_config.json calls special by role or in a list."""
    entries: list[Any] = [config.get(f"{role}_token") for role in ROLES]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = config.get(key) or ()
        entries += listed.values() if isinstance(listed, dict) else listed
    for entry in entries:
        table = {"content": entry} if isinstance(entry, str) else entry
        if isinstance(table, dict) and table.get("content"):
            yield {key: value for key, value in table.items() if key != "id"}
