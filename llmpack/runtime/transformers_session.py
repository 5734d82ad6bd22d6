"""One model in transformers, inside the worker: tokens in, logits and timings out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmpack.runtime.conversation import RefusedError, Tell

if TYPE_CHECKING:
    import jinja2
    import torch
    import transformers
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    jinja2 = LazyModule("jinja2")
    torch = LazyModule("torch")
    transformers = LazyModule("transformers")


class TransformersSession:
    """A model and its tokenizer, loaded as a user would load them; the tokenizer alone where `context` is None."""

    def __init__(self, path: str, settings: Mapping[str, Any], context: int | None) -> None:
        torch.set_num_threads(settings["threads"])
        torch.set_grad_enabled(False)
        transformers.utils.logging.disable_progress_bar()
        self._batch, self._threads, self._context = settings["batch"], settings["threads"], context
        self._tokenizer = _refusing(lambda: transformers.AutoTokenizer.from_pretrained(path, local_files_only=True))
        self._config = _refusing(lambda: transformers.AutoConfig.from_pretrained(path, local_files_only=True))
        self._text = self._config.get_text_config()  # of models that see or hear too, the part that writes
        trained = getattr(self._text, "max_position_embeddings", None)
        if context is not None and trained is not None and context > trained:
            raise RefusedError(f"a context of {context} is beyond the {trained} that the model was trained for")
        self._model: Any = None if context is None else _loaded(path, settings["processor"])
        self._cache: Any = None
        self._next: Tensor | None = None  # logits after what is in the cache, [V]

    def facts(self) -> dict[str, Any]:
        """What `Opened` holds, but for time and memory."""
        config, text, tokenizer, model = self._config, self._text, self._tokenizer, self._model
        kind = str(getattr(config, "model_type", "model"))
        weights = {} if model is None else {f"model.{model.device.type.upper()}": int(model.get_memory_footprint())}
        return {
            "description": kind if model is None else f"{kind} {str(model.dtype).removeprefix('torch.')}",
            "load": _load_mode(),
            "flash_attention": "off" if model is None or config._attn_implementation == "eager" else "on",
            "threads": self._threads,
            "context": self._context or 0,
            "trained_context": int(getattr(text, "max_position_embeddings", None) or 0),
            "vocabulary": int(text.vocab_size),
            "parameters": 0 if model is None else int(model.num_parameters()),
            "buffers": weights,
            "bos": _or_none(tokenizer.bos_token_id),
            "eos": _or_none(tokenizer.eos_token_id),
            "adds_bos": tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id],
        }

    # ---- text -------------------------------------------------------------------------------

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of a text."""
        ids = self._tokenizer(text, add_special_tokens=add_special, split_special_tokens=not parse_special).input_ids
        return [int(i) for i in ids]

    def text(self, tokens: Sequence[int], *, special: bool) -> str:
        """The text of token ids."""
        return str(
            self._tokenizer.decode(list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        )

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """A conversation under the chat template."""
        if self._tokenizer.chat_template is None:
            raise RefusedError("there is no chat template")
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as fault:
            raise RefusedError(f"the chat template does not take it: {type(fault).__name__}: {fault}") from fault

    # ---- computing --------------------------------------------------------------------------

    def _feed(self, tokens: Sequence[int], *, every: bool = False) -> Iterator[Tensor]:
        """Compute tokens after what is in the cache, a batch at a time; logits of every position, or of the last."""
        if self._model is None or self._context is None:
            raise RefusedError("only the vocabulary is loaded")
        held = 0 if self._cache is None else int(self._cache.get_seq_length())
        if held + len(tokens) > self._context:
            raise RefusedError(f"{held + len(tokens)} tokens do not fit into a context of {self._context}")
        if self._cache is None:
            self._cache = transformers.DynamicCache(config=self._model.config)
        for start in range(0, len(tokens), self._batch):
            ids = torch.tensor([list(tokens[start : start + self._batch])], device=self._model.device)
            kept = 0 if every else 1
            out = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=kept)
            self._next = out.logits[0, -1]
            if self._next.is_cuda:
                torch.cuda.synchronize()  # a GPU answers before it has computed
            yield out.logits[0]

    def logits(self, tokens: Sequence[int], file: str, tell: Tell) -> None:
        """Logits of every position [T, V] float32 from an empty cache, into an existing file."""
        self._cache = None
        mapped = np.memmap(file, np.float32, "r+")
        shared = mapped.reshape(len(tokens), -1)
        done = 0
        for part in self._feed(tokens, every=True):
            rows = part.shape[0]
            shared[done : done + rows] = part.float().cpu().numpy()
            done += rows
            tell({"done": done})
        mapped.flush()

    def prefill(self, tokens: Sequence[int], tell: Tell) -> None:
        """Compute a prompt from an empty cache up to the logits of its last token."""
        self._cache = None
        for number, _ in enumerate(self._feed(tokens), start=1):
            tell({"done": min(number * self._batch, len(tokens))})

    def timed_decode(self, tokens: Sequence[int]) -> list[int]:
        """Nanoseconds for each of some tokens, one at a time; the cache is cut back afterwards.

        A cache whose window has moved on cannot be cut back, and is emptied.
        """
        depth, times = 0 if self._cache is None else int(self._cache.get_seq_length()), []
        for token in tokens:
            started = time.perf_counter_ns()
            for _ in self._feed([token]):
                pass
            times.append(time.perf_counter_ns() - started)
        try:
            self._cache.crop(depth)
        except ValueError:
            self._cache = None
        return times

    def continuation(self, count: int, temperature: float, top_p: float, seed: int) -> Iterator[int]:
        """Tokens after what was fed, until an end token, `count`, or the end of the context."""
        generator = torch.Generator().manual_seed(seed)
        ends = _ends(self._model)
        for _ in range(count):
            assert self._next is not None  # a prompt was fed
            token = _drawn(self._next.float().cpu(), temperature, top_p, generator)
            if token in ends:
                return
            yield token
            if int(self._cache.get_seq_length()) >= (self._context or 0):
                return
            for _ in self._feed([token]):
                pass


def _loaded(path: str, processor: str) -> Any:
    """The model, with every weight that it needs and no other, where it is to compute."""
    told: dict[str, Any] = {"local_files_only": True, "output_loading_info": True}
    if processor == "cuda":
        if not torch.cuda.is_available():
            raise RefusedError(f"torch {torch.__version__} finds no GPU by CUDA here")
        told["device_map"] = {"": "cuda:0"}
    model, report = _refusing(lambda: transformers.AutoModelForCausalLM.from_pretrained(path, **told))
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names and kind.endswith("_keys")}
    if wrong:
        text = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(names[:3])}" for kind, names in wrong.items())
        raise RefusedError(f"the weights are not those of the model: {text}")
    return model.eval()


def _load_mode() -> str:
    """Whether weights lie in the mapped files or in memory of their own, as far as the system tells."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return "unknown"
    return "mmap" if ".safetensors" in maps.read_text() else "no-mmap"


def _refusing(load: Any) -> Any:
    """What a loader of transformers gives; its many kinds of complaint are one refusal."""
    try:
        return load()
    except (OSError, ValueError, TypeError, LookupError, ImportError, RuntimeError, AttributeError) as fault:
        raise RefusedError(f"transformers does not load it: {type(fault).__name__}: {fault}") from fault


def _or_none(token: int | None) -> int:
    return -1 if token is None else int(token)


def _ends(model: Any) -> frozenset[int]:
    """The tokens that end an answer."""
    said = model.generation_config.eos_token_id
    return frozenset() if said is None else frozenset(said if isinstance(said, list) else [said])


def _drawn(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """The likeliest token, or one drawn among the likeliest that have `top_p` of the probability together."""
    if temperature == 0:
        return int(logits.argmax())
    chances, order = torch.softmax(logits, -1).sort(descending=True)
    kept = (chances.cumsum(-1) - chances) < top_p  # the first always stays
    weights = torch.softmax((logits[order] / temperature).masked_fill(~kept, -torch.inf), -1)
    return int(order[torch.multinomial(weights, 1, generator=generator)])
