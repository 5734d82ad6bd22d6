"""The worker: ``python -m llmpack.runtime.transformers_worker``, spoken to by `TransformersRuntime`.

Holds nothing but the interpreter, transformers and one model, so that its memory is the runtime's. transformers is
imported when a model is opened: that is a part of the time which a user waits for a model.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

from llmpack.runtime.conversation import RefusedError, Tell, serve
from llmpack.runtime.meter import read_memory
from llmpack.runtime.worker import Arguments, Worker

if TYPE_CHECKING:
    from llmpack.runtime.transformers_session import TransformersSession

    Base = Worker[TransformersSession]
else:
    Base = Worker  # the session brings transformers with it

LIBRARIES = ("transformers", "torch", "tokenizers", "safetensors", "accelerate", "bitsandbytes", "gptqmodel")


class TransformersWorker(Base):
    """The operations of transformers."""

    _gpu = False

    def info(self, arguments: Arguments, tell: Tell) -> dict[str, Any]:
        """Versions of the libraries, and what the interpreter took before them."""
        return {"libraries": dict(_versions()), "bare_memory": self._bare}

    def open(self, arguments: Arguments, tell: Tell) -> dict[str, Any]:
        """Load a model in place of the one before."""
        self.close(arguments, tell)
        started = time.perf_counter()
        if arguments["settings"]["processor"] == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # figures are those of the processor, on machines with a GPU too
        os.environ["TORCH_COMPILE_DISABLE"] = "1"  # kernels of GPTQModel compute the same without, minutes sooner
        from llmpack.runtime.transformers_session import TransformersSession

        self._session = TransformersSession(arguments["path"], arguments["settings"], arguments["context"])
        seconds = time.perf_counter() - started
        self._gpu = arguments["settings"]["processor"] == "cuda"
        return {**self._session.facts(), "seconds": seconds, "memory": self.memory(arguments, tell)}

    def memory(self, arguments: Arguments, tell: Tell) -> dict[str, Any]:
        """The memory of this process, and of a GPU that computes for it."""
        seen = read_memory()
        if self._gpu:
            peak, now = _on_gpu()
            seen = replace(seen, peak=seen.peak + peak, resident=seen.resident + now)
        return asdict(seen)

    def close(self, arguments: Arguments, tell: Tell) -> dict[str, Any]:
        """Unload the model, if there is one."""
        self._session = None
        return {}

    def detokenize(self, arguments: Arguments, tell: Tell) -> dict[str, Any]:
        """The text of token ids."""
        return {"text": self._opened().text(arguments["tokens"], special=arguments["special"])}

    def generate(self, arguments: Arguments, tell: Tell) -> dict[str, Any]:
        """Continue a prompt; every piece of text is told as it comes."""
        session = self._opened()
        prompt = arguments["tokens"]
        if not prompt:
            raise RefusedError("there is nothing to continue: the prompt has no tokens")
        started = time.perf_counter()
        session.prefill(prompt, tell)
        first = time.perf_counter() - started
        draw = arguments["temperature"], arguments["top_p"], arguments["seed"]
        tokens: list[int] = []
        told = ""
        for token in session.continuation(arguments["count"], *draw):
            tokens.append(token)
            text = session.text(tokens, special=False)
            if not text.endswith("\ufffd"):  # the rest of a character may be in the next token
                tell({"text": text.removeprefix(told)})
                told = text
        tell({"text": session.text(tokens, special=False).removeprefix(told)})
        return {"tokens": tokens, "first_token": first, "seconds": time.perf_counter() - started}

    def prefill(self, arguments: Arguments, tell: Tell) -> dict[str, Any]:
        """Time one prompt; it stays in the cache."""
        started = time.perf_counter_ns()
        self._opened().prefill(arguments["tokens"], tell)
        return {"nanoseconds": time.perf_counter_ns() - started}

    def decode(self, arguments: Arguments, tell: Tell) -> dict[str, Any]:
        """Time tokens one at a time after what is in the cache; they do not stay in it."""
        return {"nanoseconds": self._opened().timed_decode(arguments["tokens"])}


def _on_gpu() -> tuple[int, int]:
    """The most that was taken of the GPU, and what is now: what torch reserves there, and all that it does not know of.

    The latter is the driver's context of this process, which has no mark of its own, and whatever other programs hold.
    """
    import torch

    free, whole = torch.cuda.mem_get_info()
    beside = whole - free - torch.cuda.memory_reserved()
    return beside + torch.cuda.max_memory_reserved(), whole - free


def _versions() -> Iterator[tuple[str, str]]:
    for name in LIBRARIES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


if __name__ == "__main__":
    serve(TransformersWorker().operations())
