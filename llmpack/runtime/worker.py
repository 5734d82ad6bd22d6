"""What the workers of all runtimes do alike: hold one model, and answer what needs no more than its session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from llmpack.runtime.conversation import Operation, RefusedError, Tell
from llmpack.runtime.meter import read_memory

Arguments = Mapping[str, Any]


class Session(Protocol):
    """A model that is open."""

    def tokenize(self, text: str, add_special: bool, parse_special: bool, /) -> list[int]:
        """Token ids of a text."""
        ...

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, /) -> str:
        """A conversation as the text that the model reads."""
        ...

    def logits(self, tokens: Sequence[int], file: str, tell: Tell, /) -> None:
        """Logits of every position [T, V] float32, into an existing file of that size."""
        ...


S = TypeVar("S", bound=Session)


class Worker(Generic[S]):
    """The operations; each takes the arguments of a request and returns its result."""

    names: ClassVar[tuple[str, ...]] = (
        *("info", "open", "close", "memory", "tokenize", "detokenize", "render", "logits", "generate"),
        *("prefill", "decode"),
    )

    def __init__(self) -> None:
        self._bare = asdict(read_memory())
        self._session: S | None = None

    def operations(self) -> dict[str, Operation]:
        """Every operation by its name."""
        return {name: getattr(self, name) for name in self.names}

    def _opened(self) -> S:
        if self._session is None:
            raise RefusedError("no model is open")
        return self._session

    def memory(self, arguments: Arguments, tell: Tell) -> dict[str, Any]:
        """The memory of this process."""
        return asdict(read_memory())

    def tokenize(self, arguments: Arguments, tell: Tell) -> dict[str, Any]:
        """Token ids of each text."""
        session = self._opened()
        special = arguments["add_special"], arguments["parse_special"]
        return {"tokens": [session.tokenize(text, *special) for text in arguments["texts"]]}

    def render(self, arguments: Arguments, tell: Tell) -> dict[str, Any]:
        """A conversation as the text that the model reads."""
        return {"text": self._opened().render(arguments["messages"], arguments["add_generation_prompt"])}

    def logits(self, arguments: Arguments, tell: Tell) -> dict[str, Any]:
        """Logits of every position, into a file."""
        self._opened().logits(arguments["tokens"], arguments["file"], tell)
        return {}
