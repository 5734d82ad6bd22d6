"""Runtime: a program that runs models, in a child process which may crash without taking the build along.

What is told and asked is the same for every runtime, so that reading back, judging and measuring work with any.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from llmpack.checkpoint.atomic import disk_errors
from llmpack.errors import MissingExtra, RuntimeFailed
from llmpack.process import NO_LIMITS, Child, Limits
from llmpack.runtime.meter import Memory
from llmpack.runtime.settings import RuntimeSettings

SILENCE_SECONDS = 600.0
"""How long a computation may stay silent. Every batch of tokens is a sign of life, so this is the time of one batch."""


@dataclass(frozen=True)
class Build(ABC):
    """Which build of a runtime runs.

    bare_memory  of the worker's interpreter, before the runtime was loaded
    """

    bare_memory: Memory

    @property
    @abstractmethod
    def versions(self) -> Mapping[str, str]:
        """Of the programs and libraries that compute, by name."""


@dataclass(frozen=True)
class Opened:
    """What came of opening a model: the modes that really hold, not those that were asked for.

    seconds          to load it and to make its context
    load             "mmap" or "no-mmap"; "unknown" where the system does not tell
    flash_attention  "on" or "off"
    context          tokens, as padded by the runtime; 0 if only the vocabulary is loaded
    buffers          bytes by ``"kind.place"``, as the runtime reports them ("model.CPU_REPACK", "KV.CPU", ...)
    memory           of the child, now
    """

    description: str
    seconds: float
    load: str
    flash_attention: str
    threads: int
    context: int
    trained_context: int
    vocabulary: int
    parameters: int
    buffers: Mapping[str, int]
    bos: int
    eos: int
    adds_bos: bool
    memory: Memory


@dataclass(frozen=True)
class Generated:
    """An answer, and how long it took.

    first_token  seconds from the prompt to the first token
    seconds      in all
    """

    text: str
    tokens: tuple[int, ...]
    first_token: float
    seconds: float


class Runtime(ABC):
    """A child process with a runtime in it.

    title     of the runtime, as messages name it
    module    that must be there, `package` that brings it, and the extra of llmpack that has it
    packages  whose versions say which runtime this is
    worker    module that the child runs

    Every method raises `RuntimeFailed`; its `kind` is listed in `llmpack.process`. After "refused"
    and most of "oom" the child lives on; after the others every further call raises too.
    """

    title: ClassVar[str]
    module: ClassVar[str]
    package: ClassVar[str]
    extra: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    worker: ClassVar[str]

    def __init__(self, limits: Limits = NO_LIMITS, *, silence: float = SILENCE_SECONDS) -> None:
        """Start the child; `silence` seconds without a sign of life count as a hang. Raises MissingExtra."""
        if importlib.util.find_spec(self.module) is None:
            raise MissingExtra(self.package, self.extra)
        self._silence = silence
        self._vocabulary = 0
        self._folder = tempfile.TemporaryDirectory(prefix="llmpack-")
        self._child = Child(self.worker, title=self.title, limits=limits, hint=self._crash_hint)

    @property
    def pid(self) -> int:
        """Process id of the child, for the meter."""
        return self._child.pid

    @property
    def last_lines(self) -> tuple[str, ...]:
        """The last lines that the runtime wrote."""
        return self._child.last_lines

    @classmethod
    def _crash_hint(cls) -> str:
        """What to try where the runtime was ended by a signal: lines for the error, or nothing."""
        return ""

    def _ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        return self._child.ask(operation, arguments, self._silence)

    @abstractmethod
    def info(self) -> Build:
        """Which runtime this is."""

    @abstractmethod
    def check(self, path: Path) -> None:
        """Raises RuntimeFailed ("refused") for what is no model of this runtime, MissingExtra for what it lacks."""

    def open(self, path: Path, settings: RuntimeSettings, context: int | None) -> Opened:
        """Load a model in place of the one before.

        context  tokens that the KV cache holds, or None to load the vocabulary alone
        """
        self.check(path)
        wanted = {**settings.model_dump(), "threads": settings.effective_threads}
        try:
            facts = self._ask("open", path=str(path.resolve()), settings=wanted, context=context)
        except RuntimeFailed as failure:
            raise RuntimeFailed(f"{failure}\n  while opening {path}", kind=failure.kind) from failure
        self._vocabulary = facts["vocabulary"]
        return Opened(**{**facts, "memory": Memory(**facts["memory"])})

    def memory(self) -> Memory:
        """Memory of the child, as it reads it itself."""
        return Memory(**self._ask("memory"))

    # ---- text -------------------------------------------------------------------------------

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids of a text. See `tokenize_all`, which is one round trip for many."""
        return self.tokenize_all([text], add_special=add_special, parse_special=parse_special)[0]

    def tokenize_all(
        self, texts: Sequence[str], *, add_special: bool = False, parse_special: bool = False
    ) -> list[list[int]]:
        """Token ids of each text.

        add_special    with the tokens that the model wants around a text (beginning, end)
        parse_special  read ``<|im_start|>`` and the like as the tokens they name
        """
        answer = self._ask("tokenize", texts=list(texts), add_special=add_special, parse_special=parse_special)
        return [list(ids) for ids in answer["tokens"]]

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """The text of token ids; special tokens are left out unless `special`."""
        return str(self._ask("detokenize", tokens=[int(t) for t in tokens], special=special)["text"])

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """A conversation under the file's chat template, as the runtime renders it."""
        answer = self._ask("render", messages=[dict(m) for m in messages], add_generation_prompt=add_generation_prompt)
        return str(answer["text"])

    # ---- computing --------------------------------------------------------------------------

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits of every position, [tokens, vocabulary] float32; row t predicts token t + 1.

        The ids are fed as they are: no beginning token is added. The array is a map of a file that
        has no name any more, so it costs no memory that cannot be written out.
        """
        path = self._shared_file(4 * len(tokens) * self._vocabulary)
        try:
            self._ask("logits", tokens=[int(t) for t in tokens], file=str(path))
            mapped = np.memmap(path, np.float32, "r", shape=(len(tokens), self._vocabulary))
        finally:
            path.unlink()
        return mapped.view(np.ndarray)

    def generate(
        self, tokens: Sequence[int], count: int, *, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> Generator[str, None, Generated]:
        """Continue a prompt by at most `count` tokens; yields text as it comes, returns the whole answer.

        temperature  0 takes the likeliest token each time, else tokens are drawn with `seed`
        """
        arguments = {
            "tokens": [int(t) for t in tokens],
            "count": count,
            "temperature": float(temperature),
            "top_p": float(top_p),
            "seed": seed,
        }
        conversation = self._child.stream("generate", arguments, self._silence)
        pieces: list[str] = []
        while True:
            try:
                event = next(conversation)
            except StopIteration as finished:
                end = finished.value
                return Generated("".join(pieces), tuple(end["tokens"]), end["first_token"], end["seconds"])
            if text := event.get("text"):
                pieces.append(text)
                yield text

    def answer(
        self, messages: Sequence[Mapping[str, Any]], count: int, **sampling: Any
    ) -> Generator[str, None, Generated]:
        """Answer a conversation: its rendering is tokenized and continued, as `generate` does."""
        prompt = self.tokenize(self.render(messages), add_special=False, parse_special=True)
        return (yield from self.generate(prompt, count, **sampling))

    def time_prefill(self, tokens: Sequence[int]) -> float:
        """Seconds to compute a prompt from an empty cache to the logits of its last token. It stays in the cache."""
        return float(self._ask("prefill", tokens=[int(t) for t in tokens])["nanoseconds"]) / 1e9

    def time_decode(self, tokens: Sequence[int]) -> list[float]:
        """Seconds of each token computed alone after what is in the cache; they do not stay in it."""
        return [n / 1e9 for n in self._ask("decode", tokens=[int(t) for t in tokens])["nanoseconds"]]

    def _shared_file(self, nbytes: int) -> Path:
        """An empty file of that size, its space taken: a disk that fills up later would kill the child."""
        folder = Path(self._folder.name)
        with (
            disk_errors(folder, nbytes, "set TMPDIR to a folder with more room"),
            tempfile.NamedTemporaryFile(dir=folder, delete=False) as file,
        ):
            file.truncate(nbytes)
            if nbytes and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, nbytes)
        return Path(file.name)

    def close(self) -> None:
        """End the child and remove its files."""
        self._child.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
