"""One model in llama.cpp, inside the worker: tokens in, logits and timings out."""

from __future__ import annotations

import ctypes
import mmap
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmpack.runtime.conversation import RefusedError, Tell
from llmpack.runtime.llama_library import Library

GGML_TYPE = {"f16": 1, "q4_0": 2, "q8_0": 8}
LOAD_MODE = {"auto": -1, "no-mmap": 0, "mmap": 1}
FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}


@contextmanager
def shared_file(path: str) -> Iterator[int]:
    """An existing file mapped for writing; its address. Numbers cross to the parent through it."""
    with Path(path).open("r+b") as file, mmap.mmap(file.fileno(), 0) as target:
        view = (ctypes.c_char * len(target)).from_buffer(target)
        try:
            yield ctypes.addressof(view)
        finally:
            del view  # a map that is exported cannot be closed


class Session:
    """A loaded model, with a context unless only its vocabulary is wanted."""

    def __init__(self, library: Library, path: str, settings: Mapping[str, Any], context: int | None) -> None:
        self.library, self.api, self.settings = library, library.api, settings
        self.context: Any = None  # handles of the C library, which has no types here
        self.batch: Any = None
        self.memory: Any = None
        library.forget_log()
        started = time.perf_counter()
        self.model = self._load(path, vocabulary_only=context is None)
        self.vocabulary = self.api.llama_model_get_vocab(self.model)
        self.size = int(self.api.llama_vocab_n_tokens(self.vocabulary))
        self.position = 0
        if context is not None:
            self._make_context(context)
        self.seconds = time.perf_counter() - started
        self.load = self._effective_load(path)

    def _load(self, path: str, *, vocabulary_only: bool) -> Any:
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = LOAD_MODE[self.settings["load"]]
        params.vocab_only = vocabulary_only
        params.check_tensors = False
        model = self.api.llama_model_load_from_file(path.encode(), params)
        if not model:
            raise self._refusal("llama.cpp does not load this file")
        return model

    def _make_context(self, context: int) -> None:
        trained = int(self.api.llama_model_n_ctx_train(self.model))
        if context > trained:
            raise RefusedError(f"a context of {context} is beyond the {trained} that the model was trained for")
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, self.settings["batch"], self.settings["ubatch"]
        params.n_threads = params.n_threads_batch = self.settings["threads"]
        params.type_k = params.type_v = GGML_TYPE[self.settings["kv"]]
        params.flash_attn_type = FLASH_ATTENTION[self.settings["flash_attention"]]
        params.offload_kqv = params.op_offload = False
        params.swa_full = False  # windows keep what they see and no more, as llama.cpp's own programs have it
        params.no_perf = True
        self.context = self.api.llama_init_from_model(self.model, params)
        if not self.context:
            raise self._refusal(f"llama.cpp makes no context of {context} tokens")
        self.memory = self.api.llama_get_memory(self.context)
        self.batch_size = int(self.api.llama_n_batch(self.context))
        self.batch = self.api.llama_batch_init(self.batch_size, 0, 1)

    def _refusal(self, what: str) -> RefusedError:
        return RefusedError(f"{what}: {self.library.errors()}")

    def _effective_load(self, path: str) -> str:
        """The mode that really holds. The structs have changed their fields before, so it is looked at, not assumed."""
        said = {"none": "no-mmap", "mmap": "mmap"}.get(self.library.logged_load_mode(), "")
        if sys.platform == "linux" and self.context:
            mapped = str(Path(path).resolve()) in Path("/proc/self/maps").read_text()
            seen = "mmap" if mapped else "no-mmap"
            if said and said != seen:
                raise RefusedError(f"llama.cpp says that it loaded with {said}, the process shows {seen}")
            said = seen
        asked = self.settings["load"]
        if self.context and asked not in ("auto", said):
            raise RefusedError(f'load = "{asked}" was asked for, and llama.cpp loaded with {said or "an unknown mode"}')
        return said

    def facts(self) -> dict[str, Any]:
        """What came of opening it."""
        description = ctypes.create_string_buffer(128)
        self.api.llama_model_desc(self.model, description, 128)
        vocabulary = self.vocabulary
        return {
            "description": description.value.decode("utf-8", "replace"),
            "seconds": self.seconds,
            "load": self.load,
            "flash_attention": self.library.logged_flash_attention(self.settings["flash_attention"]),
            "threads": self.settings["threads"],
            "context": int(self.api.llama_n_ctx(self.context)) if self.context else 0,
            "trained_context": int(self.api.llama_model_n_ctx_train(self.model)),
            "vocabulary": self.size,
            "parameters": int(self.api.llama_model_n_params(self.model)),
            "buffers": self.library.logged_buffers(),
            "bos": int(self.api.llama_vocab_bos(vocabulary)),
            "eos": int(self.api.llama_vocab_eos(vocabulary)),
            "adds_bos": bool(self.api.llama_vocab_get_add_bos(vocabulary)),
        }

    def close(self) -> None:
        """Free everything. The session is not used afterwards."""
        if self.batch is not None:
            self.api.llama_batch_free(self.batch)
        if self.context:
            self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)

    # ---- text -------------------------------------------------------------------------------

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of a text."""
        data = text.encode("utf-8", "surrogatepass")
        room = len(data) + 8
        for _ in range(2):
            buffer = (self.api.llama_token * room)()
            count = self.api.llama_tokenize(self.vocabulary, data, len(data), buffer, room, add_special, parse_special)
            if count >= 0:
                return list(buffer[:count])
            room = -count
        raise RefusedError(f"llama.cpp does not tokenize this text of {len(data)} bytes")

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes that a token stands for; may be a part of a character."""
        self._known([token])
        room = 64
        for _ in range(2):
            buffer = ctypes.create_string_buffer(room)
            count = self.api.llama_token_to_piece(self.vocabulary, token, buffer, room, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            room = -count
        raise RefusedError(f"llama.cpp has no text for token {token}")

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The model's chat template applied by llama-cpp-python's own formatter."""
        template = self.api.llama_model_chat_template(self.model, None)
        if template is None:
            raise RefusedError("the file has no chat template")
        chat = self.library.whole_package()
        import jinja2

        bos, eos = (self._special_text(t) for t in (self.api.llama_vocab_bos, self.api.llama_vocab_eos))
        try:
            formatter = chat.Jinja2ChatFormatter(template.decode(), eos, bos, add_generation_prompt)
            return str(formatter(messages=[dict(message) for message in messages]).prompt)
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise RefusedError(f"the chat template fails: {type(error).__name__}: {error}") from error
        except RecursionError as error:
            raise RefusedError("the chat template recurses without end") from error

    def _special_text(self, which: Any) -> str:
        token = int(which(self.vocabulary))
        return self.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    # ---- computing --------------------------------------------------------------------------

    def _known(self, tokens: Sequence[int]) -> None:
        wrong = [t for t in tokens if not 0 <= t < self.size]
        if wrong:
            raise RefusedError(f"token {wrong[0]} is not in the vocabulary of {self.size}")

    def clear(self) -> None:
        """Empty the KV cache."""
        self.api.llama_memory_clear(self.memory, True)
        self.position = 0

    def cut(self, position: int) -> None:
        """Drop what the KV cache holds from that position on."""
        if not self.api.llama_memory_seq_rm(self.memory, 0, position, -1):
            raise RefusedError(f"this model's cache cannot be cut at {position}")
        self.position = position

    def feed(self, tokens: Sequence[int], *, every_logit: bool = False) -> Iterator[int]:
        """Compute tokens after those in the cache, a batch at a time; yields how many each batch had.

        Logits are kept of every token of the batch, or of the last token of all.
        """
        if self.context is None:
            raise RefusedError("only the vocabulary is loaded; open the model with a context")
        self._known(tokens)
        room = int(self.api.llama_n_ctx(self.context))
        if self.position + len(tokens) > room:
            raise RefusedError(f"{self.position} + {len(tokens)} tokens do not fit a context of {room}")
        for start in range(0, len(tokens), self.batch_size):
            part = tokens[start : start + self.batch_size]
            last = start + len(part) == len(tokens)
            self._decode(part, every_logit, last)
            yield len(part)

    def _decode(self, tokens: Sequence[int], every_logit: bool, last: bool) -> None:
        batch = self.batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = self.position + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = every_logit
        batch.logits[len(tokens) - 1] = every_logit or last
        code = self.api.llama_decode(self.context, batch)
        if code:
            raise self._refusal(f"llama.cpp fails to compute {len(tokens)} tokens (code {code})")
        self.api.llama_synchronize(self.context)
        self.position += len(tokens)

    def logits(self, tokens: Sequence[int], path: str, tell: Tell) -> None:
        """Write the logits of every position, float32 [tokens, vocabulary], into an existing file of that size."""
        row = 4 * self.size
        self.clear()
        written = 0
        with shared_file(path) as base:
            for count in self.feed(tokens, every_logit=True):
                ctypes.memmove(base + written * row, self.api.llama_get_logits(self.context), count * row)
                written += count
                tell({"done": written})

    def timed_prefill(self, tokens: Sequence[int], tell: Tell) -> int:
        """Nanoseconds to compute a prompt from an empty cache up to the logits of its last token."""
        self.clear()
        started = time.perf_counter_ns()
        for done in self.feed(tokens):
            tell({"done": done})
        return time.perf_counter_ns() - started

    def timed_decode(self, tokens: Sequence[int]) -> list[int]:
        """Nanoseconds for each of some tokens, one at a time; the cache is cut back afterwards."""
        depth, times = self.position, []
        for token in tokens:
            started = time.perf_counter_ns()
            for _ in self.feed([token]):
                pass
            times.append(time.perf_counter_ns() - started)
        self.cut(depth)
        return times

    def sampler(self, temperature: float, top_p: float, seed: int) -> Any:
        """A chain of llama.cpp's samplers; temperature 0 takes the likeliest token."""
        chain = self.api.llama_sampler_chain_init(self.api.llama_sampler_chain_default_params())
        if temperature == 0:
            self.api.llama_sampler_chain_add(chain, self.api.llama_sampler_init_greedy())
            return chain
        for link in (
            self.api.llama_sampler_init_top_p(top_p, 1),
            self.api.llama_sampler_init_temp(temperature),
            self.api.llama_sampler_init_dist(seed),
        ):
            self.api.llama_sampler_chain_add(chain, link)
        return chain

    def continuation(self, sampler: Any, count: int) -> Iterator[int]:
        """Sampled tokens after what was fed, until an end token, `count`, or the end of the context."""
        room = int(self.api.llama_n_ctx(self.context))
        for _ in range(count):
            token = int(self.api.llama_sampler_sample(sampler, self.context, -1))
            if self.api.llama_vocab_is_eog(self.vocabulary, token):
                return
            yield token
            if self.position >= room:
                return
            for _ in self.feed([token]):
                pass
