"""The worker: ``python -m llmpack.runtime.llama_worker``, spoken to by `runtime.llama.LlamaRuntime`.

Holds nothing but the interpreter, llama.cpp and one model, so that its memory is the runtime's.
"""

from __future__ import annotations

import codecs
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from llmpack.runtime.conversation import RefusedError, Tell, serve
from llmpack.runtime.llama_library import Library
from llmpack.runtime.llama_session import Session, shared_file
from llmpack.runtime.meter import read_memory
from llmpack.runtime.worker import Arguments, Worker


class LlamaWorker(Worker[Session]):
    """The operations of llama.cpp: those of every runtime, and its own quantizer."""

    names = (*Worker.names, "row_bytes", "quantize_rows")

    def __init__(self) -> None:
        super().__init__()  # before the library: what the interpreter takes by itself
        self._library = Library()

    def info(self, arguments: Arguments, tell: Tell) -> dict[str, Any]:
        """What this build of llama.cpp is, and what the interpreter took before it."""
        return {
            "commit": self._library.ggml.ggml_commit().decode(),
            "version": self._library.ggml.ggml_version().decode(),
            "system": self._library.api.llama_print_system_info().decode().strip(),
            "bare_memory": self._bare,
        }

    def open(self, arguments: Arguments, tell: Tell) -> dict[str, Any]:
        """Load a model in place of the one before."""
        self.close(arguments, tell)
        self._session = Session(self._library, arguments["path"], arguments["settings"], arguments["context"])
        return {**self._session.facts(), "memory": asdict(read_memory())}

    def close(self, arguments: Arguments, tell: Tell) -> dict[str, Any]:
        """Unload the model, if there is one."""
        if self._session is not None:
            self._session.close()
            self._session = None
        return {}

    def detokenize(self, arguments: Arguments, tell: Tell) -> dict[str, Any]:
        """The text of token ids."""
        session = self._opened()
        pieces = (session.piece(token, arguments["special"]) for token in arguments["tokens"])
        return {"text": b"".join(pieces).decode("utf-8", "replace")}

    def generate(self, arguments: Arguments, tell: Tell) -> dict[str, Any]:
        """Continue a prompt; every piece of text is told as it comes."""
        session = self._opened()
        prompt, count = arguments["tokens"], arguments["count"]
        if not prompt:
            raise RefusedError("there is nothing to continue: the prompt has no tokens")
        started = time.perf_counter()
        session.clear()
        for done in session.feed(prompt):
            tell({"prompt": done})
        first = time.perf_counter() - started
        sampler = session.sampler(arguments["temperature"], arguments["top_p"], arguments["seed"])
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        tokens = []
        for token in session.continuation(sampler, count):
            tokens.append(token)
            tell({"text": decoder.decode(session.piece(token))})
        tell({"text": decoder.decode(b"", final=True)})
        session.api.llama_sampler_free(sampler)
        return {"tokens": tokens, "first_token": first, "seconds": time.perf_counter() - started}

    def prefill(self, arguments: Arguments, tell: Tell) -> dict[str, Any]:
        """Time one prompt; it stays in the cache."""
        return {"nanoseconds": self._opened().timed_prefill(arguments["tokens"], tell)}

    def decode(self, arguments: Arguments, tell: Tell) -> dict[str, Any]:
        """Time tokens one at a time after what is in the cache; they do not stay in it."""
        return {"nanoseconds": self._opened().timed_decode(arguments["tokens"])}

    def row_bytes(self, arguments: Arguments, tell: Tell) -> dict[str, Any]:
        """Bytes of a packed row, and whether the type can be quantized without an importance matrix."""
        ggml, kind = self._library.ggml, arguments["ggml_type"]
        return {
            "row_bytes": ggml.ggml_row_size(kind, arguments["columns"]),
            "needs_importance": ggml.ggml_quantize_requires_imatrix(kind),
        }

    def quantize_rows(self, arguments: Arguments, tell: Tell) -> dict[str, Any]:
        """ggml_quantize_chunk over rows in a file: weights, importance (or none), then room for the result."""
        rows, columns, kind = arguments["rows"], arguments["columns"], arguments["ggml_type"]
        ggml = self._library.ggml
        row_bytes = ggml.ggml_row_size(kind, columns)
        weights = 4 * rows * columns
        result = weights + (4 * columns if arguments["importance"] else 0)
        with shared_file(arguments["file"]) as base:
            importance = base + weights if arguments["importance"] else None

            def quantize(first: int, last: int) -> int:
                source, target = base + 4 * first * columns, base + result + first * row_bytes
                return int(ggml.ggml_quantize_chunk(kind, source, target, 0, last - first, columns, importance))

            # rows are independent, so the bytes do not depend on how they are shared out
            cuts = [rows * n // arguments["threads"] for n in range(arguments["threads"] + 1)]
            with ThreadPoolExecutor(arguments["threads"]) as pool:
                written = sum(pool.map(quantize, cuts[:-1], cuts[1:]))
        if written != rows * row_bytes:
            raise RefusedError(f"ggml wrote {written} bytes, {rows * row_bytes} were due")
        return {}


if __name__ == "__main__":
    serve(LlamaWorker().operations())
