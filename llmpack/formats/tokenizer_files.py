"""The tokenizer files of a checkpoint, parsed once. Needs neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from llmpack.errors import InputRejected, Problem


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files say; None or empty where a file does not exist.

    folder         where they lie, for messages
    tokenizer      tokenizer.json: vocabulary, merges, added tokens, how text is split
    config         tokenizer_config.json: names of special tokens, chat template
    added          added_tokens.json: token to id
    sentencepiece  tokenizer.model, as it is
    merges_text    merges.txt
    template_file  chat_template.jinja
    template_json  chat_template.json
    """

    folder: Path
    tokenizer: Mapping[str, Any] | None = None
    config: Mapping[str, Any] | None = None
    added: Mapping[str, int] = field(default_factory=dict)
    sentencepiece: bytes | None = None
    merges_text: str | None = None
    template_file: str | None = None
    template_json: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, folder: Path, paths: Sequence[Path]) -> TokenizerFiles:
        """Parse those of `paths` that have a known name. Raises InputRejected with every file that does not parse."""
        by_name = {path.name: path for path in paths}
        problems: list[Problem] = []

        def table(name: str) -> Any:
            path = by_name.get(name)
            if path is None:
                return None
            try:
                # Short strings are shared: tokens occur in the vocabulary and again in the merges.
                parsed = from_json(path.read_bytes(), cache_strings="all")
            except ValueError as fault:
                problems.append(Problem(f"not JSON ({fault})", where=str(path), rule="tokenizer"))
                return None
            if not isinstance(parsed, dict):
                problems.append(Problem("holds no JSON object", where=str(path), rule="tokenizer"))
                return None
            return parsed

        def text(path: Path | None) -> str | None:
            if path is None:
                return None
            try:
                return path.read_bytes().decode()
            except UnicodeDecodeError as fault:
                problems.append(Problem(f"not UTF-8 text ({fault})", where=str(path), rule="tokenizer"))
                return None

        model = by_name.get("tokenizer.model")
        files = cls(
            folder=folder,
            tokenizer=table("tokenizer.json"),
            config=table("tokenizer_config.json"),
            added=table("added_tokens.json") or {},
            sentencepiece=None if model is None else model.read_bytes(),
            merges_text=text(by_name.get("merges.txt")),
            template_file=text(by_name.get("chat_template.jinja")),
            template_json=table("chat_template.json"),
        )
        if problems:
            raise InputRejected(problems)
        return files

    def reject(self, name: str, *messages: str) -> InputRejected:
        """The error for what is wrong in one of the files (rule ``tokenizer``)."""
        where = str(self.folder / name)
        return InputRejected([Problem(message, where=where, rule="tokenizer") for message in messages])
