"""Special tokens, the flags that add them, merges and chat templates, as GGUF keys.

The rules are those by which llama.cpp's converter reads a checkpoint (gguf-py/gguf/vocab.py at
https://github.com/ggml-org/llama.cpp), so that the same files give the same keys. Three differences,
each a stop where the converter warns and goes on: a special token without a row in the embedding, a
negative token id that is no token, and two chat templates that contradict each other.
"""

from __future__ import annotations

import string as letters
from collections.abc import Mapping, Sequence
from operator import methodcaller
from typing import Any

from llmpack.formats.gguf_container import Value, boolean, string, strings, uint32
from llmpack.formats.tokenizer_files import TokenizerFiles

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
ID_KEYS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "eot": "tokenizer.ggml.eot_token_id",
    "eom": "tokenizer.ggml.eom_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "sep": "tokenizer.ggml.seperator_token_id",  # so spelled in the format
    "pad": "tokenizer.ggml.padding_token_id",
    "mask": "tokenizer.ggml.mask_token_id",
}
FLAG_KEYS = {role: f"tokenizer.ggml.add_{role}_token" for role in ("bos", "eos", "sep")}
_TEMPLATE = "tokenizer.chat_template"
_spaces = methodcaller("count", " ")
_NAME_LETTERS = letters.ascii_letters + letters.digits
# Merges are stored as "left right", so a space inside a part takes the place that byte-level BPE gives it.
_SPACE_IN_MERGE = chr(ord(" ") + 256)


def special_keys(files: TokenizerFiles, config: Mapping[str, Any], tokens: int, *, merges: bool) -> dict[str, Value]:
    """The keys, in file order.

    config  the checkpoint's config.json
    tokens  size of the vocabulary, rows of the embedding
    merges  whether this kind of vocabulary has merges

    Raises InputRejected (rule ``tokenizer``) for ids out of range, missing or malformed merges, and
    contradicting chat templates.
    """
    keys: dict[str, Value] = {}
    if merges:
        keys["tokenizer.ggml.merges"] = strings(merge_texts(files))
    roles = _Roles(files)
    ids = roles.ids()
    for role in roles.roles:
        number = config.get(f"{role}_token_id")
        if role not in ids and isinstance(number, int) and not isinstance(number, bool):
            ids[role] = number
    lost = [f"{role}_token has the id {number}" for role, number in ids.items() if not 0 <= number < tokens]
    if lost:
        message = f"{', '.join(lost)}; the vocabulary has {tokens} tokens. Correct it here or in config.json"
        raise files.reject("tokenizer_config.json", message)
    keys |= {ID_KEYS[role]: uint32(number) for role, number in ids.items() if role in ID_KEYS}
    keys |= {FLAG_KEYS[role]: boolean(flag) for role, flag in roles.flags.items() if role in FLAG_KEYS}
    return keys | chat_template_keys(files) | _normalizer_keys((files.tokenizer or {}).get("normalizer"))


def merge_texts(files: TokenizerFiles) -> list[str]:
    """Every merge as ``left right``, from tokenizer.json or, where it has none, merges.txt."""
    texts: list[str] = []
    for batch in files.merge_batches():
        try:
            joined = [" ".join(merge) if type(merge) is list else _merge_text(files, merge) for merge in batch]
        except TypeError:
            joined = [_merge_text(files, merge) for merge in batch]
        if set(map(_spaces, joined)) != {1}:
            joined = [t if t.count(" ") == 1 else _merge_text(files, m) for t, m in zip(joined, batch, strict=True)]
        texts += joined
    if texts:
        return texts
    if files.merges_text is None:
        raise files.reject("tokenizer.json", "this BPE vocabulary has no merges, here or in merges.txt")
    pairs = [line.split() for line in files.merges_text.splitlines() if line.strip()]
    if pairs and pairs[0][0].startswith("#"):
        pairs = pairs[1:]
    odd = [" ".join(pair) for pair in pairs if len(pair) != 2]
    if odd or not pairs:
        raise files.reject("merges.txt", f"{len(odd) or 'no'} lines are merges of two parts (first: {odd[:1]})")
    return [" ".join(pair) for pair in pairs]


def _merge_text(files: TokenizerFiles, merge: Any) -> str:
    if isinstance(merge, str):
        return merge
    if not (isinstance(merge, list) and len(merge) == 2 and all(isinstance(part, str) for part in merge)):
        raise files.reject("tokenizer.json", f"a merge is a pair of texts, not {str(merge)[:60]!r}")
    return " ".join(part.replace(" ", _SPACE_IN_MERGE) for part in merge)


class _Roles:
    """Which token plays which role, and which are added to every text; what tokenizer.json adds counts too."""

    def __init__(self, files: TokenizerFiles) -> None:
        self.files = files
        self.roles: tuple[str, ...] = ROLES
        self.flags: dict[str, bool] = {}
        self.named = dict(files.config or {})
        tokenizer = files.tokenizer
        if tokenizer is not None:
            for missing, other in (("bos", "cls"), ("eos", "sep")):
                if not self._of(missing) and self._of(other):
                    self._name(missing, self._of(other))
            processor = tokenizer.get("post_processor") or {}
            for one in processor.get("processors", [processor]):
                if one.get("type") == "RobertaProcessing":
                    self._roberta(one)
                elif one.get("type") == "TemplateProcessing":
                    self._template(one.get("single") or [], one.get("pair") or [])

    def ids(self) -> dict[str, int]:
        """Role to token id, for the roles that tokenizer_config.json names; fills `flags` from it as well."""
        if not self.files.config:
            return {}
        added: dict[Any, Any] = {}
        for token in (self.files.tokenizer or {}).get("added_tokens") or ():
            added.setdefault(token.get("content"), token.get("id"))
        found: dict[str, int] = {}
        for role in self.roles:
            flag = self.named.get(f"add_{role}_token")
            if isinstance(flag, bool):
                self.flags[role] = flag
            entry = self.named.get(f"{role}_token")
            text = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(text, str) and isinstance(added.get(text), int):
                found[role] = added[text]
        return found

    def _of(self, role: str) -> Any:
        return self.named.get(f"{role}_token")

    def _name(self, role: str, token: Any) -> None:
        self.named[f"{role}_token"] = token

    def _roberta(self, processor: Mapping[str, Any]) -> None:
        self.flags |= {"bos": True, "eos": True, "sep": True}
        for role, twin in (("cls", "bos"), ("sep", "eos")):
            if not self._of(role):
                self._name(role, (processor.get(role) or [self._of(twin)])[0])

    def _template(self, single: Sequence[Mapping[str, Any]], pair: Sequence[Mapping[str, Any]]) -> None:
        first = last = None
        if len(single) > 1:
            first, last = _special(single[0]), _special(single[-1])
            if first:
                self._opens(first)
            if last:
                self._closes(last)
        begin = 1 if pair and first and _special(pair[0]) == first else 0
        end = len(pair) - (1 if pair and last and _special(pair[-1]) == last else 0)
        inner = pair[begin:end]
        if len(inner) > 2 and (_sequence(inner[0]), _sequence(inner[-1])) == ("A", "B"):
            self._separates([_special(item) for item in inner[1:-1]], closed=bool(last))

    def _opens(self, token: str) -> None:
        if token not in (self._of("bos"), self._of("cls")):
            for role in ("bos", "cls"):
                if not self._of(role):
                    self._name(role, token)
        self.flags["bos"] = token in (self._of("bos"), self._of("cls"))

    def _closes(self, token: str) -> None:
        eos = self._of("eos")
        if token != eos:
            # What the config calls the end of a sequence then ends a turn.
            for role in ("eot", "eom"):
                if role not in self.roles:
                    self.roles = (*self.roles, role)
                    self._name(role, eos)
                    break
            self._name("eos", token)
        self.flags["eos"] = True

    def _separates(self, tokens: Sequence[str | None], *, closed: bool) -> None:
        separators = (self._of("sep"), self._of("eos"))
        first = bool(tokens[0]) and tokens[0] in separators and not closed
        second = len(tokens) == 2 and bool(tokens[1]) and tokens[1] in separators
        self.flags["sep"] = first or second
        if self.flags["sep"] and not self._of("sep"):
            self._name("sep", self._of("eos"))


def _special(item: Mapping[str, Any]) -> str | None:
    return (item.get("SpecialToken") or {}).get("id")


def _sequence(item: Mapping[str, Any]) -> str | None:
    return (item.get("Sequence") or {}).get("id")


def chat_templates(files: TokenizerFiles) -> dict[str, str]:
    """Chat templates by name; ``default`` is the one that is used unasked.

    They stand in tokenizer_config.json, chat_template.jinja or chat_template.json. Raises
    InputRejected if two of these say different things: readers disagree on which one counts.
    """
    sources: dict[str, dict[str, str]] = {}
    if files.config is not None and files.config.get("chat_template") is not None:
        sources["tokenizer_config.json"] = _named_templates(files, files.config["chat_template"])
    if files.template_file is not None:
        sources["chat_template.jinja"] = {"default": files.template_file}
    elif files.template_json is not None and files.template_json.get("chat_template") is not None:
        sources["chat_template.json"] = _named_templates(files, files.template_json["chat_template"])
    if len(sources) == 2 and len({tuple(sorted(found.items())) for found in sources.values()}) == 2:
        message = f"contradicts {list(sources)[1]}: two different chat templates; delete the one that is wrong"
        raise files.reject("tokenizer_config.json", message)
    return next(iter(sources.values()), {})


def _named_templates(files: TokenizerFiles, entry: Any) -> dict[str, str]:
    if isinstance(entry, str):
        return {"default": entry}
    found = {}
    for choice in entry if isinstance(entry, list) else [entry]:
        name, template = (choice.get("name"), choice.get("template")) if isinstance(choice, dict) else (None, None)
        if not (isinstance(name, str) and isinstance(template, str)):
            message = "`chat_template` is a text, or a list of tables with `name` and `template`"
            raise files.reject("tokenizer_config.json", message)
        found["".join(c if c in _NAME_LETTERS else "_" for c in name)] = template
    return found


def chat_template_keys(files: TokenizerFiles) -> dict[str, Value]:
    """The templates as keys: named ones first, then their names, then the default."""
    # Without tokenizer_config.json the converter writes no template; nothing would say what the roles are called.
    found = chat_templates(files) if files.config else {}
    others = sorted(name for name, template in found.items() if name != "default" and name and template)
    keys = {f"{_TEMPLATE}.{name}": string(found[name]) for name in others}
    if others:
        keys["tokenizer.chat_templates"] = strings(others)
    if found.get("default"):
        keys[_TEMPLATE] = string(found["default"])
    return keys


def _normalizer_keys(normalizer: Mapping[str, Any] | None) -> dict[str, Value]:
    keys: dict[str, Value] = {}
    lowercase, accents = (f"tokenizer.ggml.normalizer.{name}" for name in ("lowercase", "strip_accents"))
    for one in (normalizer or {}).get("normalizers") or [normalizer or {}]:
        match one.get("type"):
            case "Lowercase":
                keys[lowercase] = boolean(True)
            case "StripAccents":
                keys[accents] = boolean(True)
            case "BertNormalizer":
                keys |= {lowercase: boolean(one["lowercase"])} if isinstance(one.get("lowercase"), bool) else {}
                keys |= {accents: boolean(one["strip_accents"])} if isinstance(one.get("strip_accents"), bool) else {}
            case "Sequence":
                keys |= _normalizer_keys(one)
    return keys
