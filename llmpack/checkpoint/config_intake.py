"""config.json of a stranger: what it may say before anything is built from it.

Rules: ``config-json`` (not a plain JSON table), ``remote-code`` (asks to run Python of the repository),
``config-hub-ref`` (steers a loader to other code or another repository), ``config-range`` (sizes that
no model has), ``already-quantized`` (weights in a form that llmpack does not decode).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmpack.checkpoint.strict_json import parse_json
from llmpack.errors import InputRejected, Problem

MAX_CONFIG = 1 << 20

# Inclusive bounds of integer keys. A list gives one value a layer.
_INTEGER_BOUNDS = {
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 1024),
    "num_key_value_heads": (1, 1024),
    "hidden_size": (1, 131_072),
    "intermediate_size": (1, 4_194_304),
    "vocab_size": (1, 4_194_304),
    "head_dim": (1, 4096),
    "max_position_embeddings": (1, 2**31 - 1),
    "sliding_window": (1, 2**31 - 1),
    "num_experts": (1, 4096),
    "num_local_experts": (1, 4096),
}
# Exclusive bounds of real keys.
_REAL_BOUNDS = {
    "rms_norm_eps": (0.0, 1.0),
    "layer_norm_eps": (0.0, 1.0),
    "layer_norm_epsilon": (0.0, 1.0),
    "norm_eps": (0.0, 1.0),
    "rope_theta": (0.0, 1e15),
    "factor": (0.0, 1e6),
    "low_freq_factor": (0.0, 1e6),
    "high_freq_factor": (0.0, 1e6),
}
_CODE_KEYS = {"auto_map", "trust_remote_code", "custom_pipelines"}
# Every config saved by transformers before version 5 tells here where it came from. It is read by no loader
# of ours and dropped, so it may hold a hub name.
_ORIGIN_KEYS = {"_name_or_path"}
_STEERING_KEY = re.compile(r"_?\w*_implementation(_internal)?|_commit_hash|_attn_implementation\w*")
# Names a kind of cache that transformers has built in ("hybrid" in every Gemma config); dropped like the others.
_PLAIN_NAMES = {"cache_implementation"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_MISSING = object()


def read_config(path: Path) -> dict[str, Any]:
    """The checked config, without the keys that only steer loaders.

    A `quantization_config` is kept: whether it is allowed depends on the recipe.
    Raises InputRejected with every problem.
    """
    where = str(path)
    size = path.stat().st_size
    if size > MAX_CONFIG:
        raise _reject(where, f"{size} bytes; a config has at most {MAX_CONFIG}")
    try:
        config = parse_json(path.read_bytes())
    except ValueError as error:
        raise _reject(where, str(error)) from error
    if not isinstance(config, dict):
        raise _reject(where, "the file holds no JSON object")
    problems = config_problems(config, where)
    if problems:
        raise InputRejected(problems)
    cleaned: dict[str, Any] = _without_steering(config)
    return cleaned


def _reject(where: str, message: str) -> InputRejected:
    return InputRejected([Problem(message, where=where, rule="config-json")])


def config_problems(config: Mapping[str, Any], where: str) -> list[Problem]:
    """Everything that is wrong with a parsed config, nested configs included."""
    found = []
    for key_path, key, value in _walk(config):
        for rule, message in _value_problems(key, value):
            found.append(Problem(message, path=key_path, where=where, rule=rule))
    for prefix, table in _tables(config):
        for message in _shape_problems(table):
            found.append(Problem(message, path=prefix, where=where, rule="config-range"))
    return found


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """The method of a `quantization_config` ("gptq", "bitsandbytes", ...), or None for plain weights."""
    entry = config.get("quantization_config")
    if not entry:
        return None
    method = entry.get("quant_method") if isinstance(entry, Mapping) else None
    return str(method)[:40] if method else "unknown"


def quantized_config_problem(config: Mapping[str, Any], where: str) -> Problem | None:
    """The refusal of weights that llmpack cannot decode, or None."""
    method = quantization_method(config)
    if method is None:
        return None
    text = (
        f"the weights are already quantized (method {method!r}), a form that llmpack does not decode; "
        "use the original checkpoint, or dequantize this one where it was made and save it as bf16"
    )
    return Problem(text, path="quantization_config", where=where, rule="already-quantized")


def _walk(config: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Every value with its key path and the nearest key; lists are opened. Depth is bounded by the parser."""
    stack: list[tuple[str, str, Any]] = [(str(k), str(k), v) for k, v in reversed(list(config.items()))]
    while stack:
        path, key, value = stack.pop()
        yield path, key, value
        if isinstance(value, Mapping):
            stack.extend((f"{path}.{k}", str(k), v) for k, v in reversed(list(value.items())))
        elif isinstance(value, list):
            stack.extend((f"{path}.{i}", key, v) for i, v in reversed(list(enumerate(value))))


def _tables(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "", config
    for path, _, value in _walk(config):
        if isinstance(value, Mapping):
            yield path, value


def _value_problems(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if key in _CODE_KEYS and value:
        yield "remote-code", "the repository asks to run its own Python code; llmpack never does that"
    elif _steers(key, value):
        yield "config-hub-ref", f"{str(value)[:80]!r} would steer the loader to other code; use a checkpoint without it"
    elif isinstance(value, str) and key not in _ORIGIN_KEYS and _HUB_NAME.fullmatch(value):
        yield (
            "config-hub-ref",
            f"{value[:80]!r} is the name of another repository, which a config must not refer to; "
            "delete the key if you trust the checkpoint without it",
        )
    if isinstance(value, float) and math.isnan(value):
        yield "config-range", "the value is not a number (NaN)"
    if key in _INTEGER_BOUNDS and value is not None and not isinstance(value, list | Mapping):
        yield from _outside(value, *_INTEGER_BOUNDS[key])
    if key in _REAL_BOUNDS and value is not None and not isinstance(value, list | Mapping):
        low, high = _REAL_BOUNDS[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
            yield "config-range", f"{str(value)[:40]!r} is not between {low:g} and {high:g}"


def _steers(key: str, value: Any) -> bool:
    if key in _PLAIN_NAMES and isinstance(value, str):
        return _HUB_NAME.fullmatch(value) is not None
    return _STEERING_KEY.fullmatch(key) is not None and value is not None and not isinstance(value, bool)


def _outside(value: Any, low: int, high: int) -> Iterator[tuple[str, str]]:
    if isinstance(value, bool) or not isinstance(value, int):
        yield "config-range", f"{str(value)[:40]!r} is not a whole number"
    elif not low <= value <= high:
        yield "config-range", f"{str(value)[:40]} is not between {low} and {high}"


def _shape_problems(table: Mapping[str, Any]) -> Iterator[str]:
    """What sizes must have to do with each other; only where both are plain numbers in range."""
    heads, hidden = _size(table, "num_attention_heads"), _size(table, "hidden_size")
    kv_heads = _size(table, "num_key_value_heads")
    if heads and hidden and _size(table, "head_dim") is None and hidden % heads:
        yield f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
    if heads and kv_heads and heads % kv_heads:
        yield f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}"


def _size(table: Mapping[str, Any], key: str) -> int | None:
    value = table.get(key)
    low, high = _INTEGER_BOUNDS[key]
    return value if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high else None


def _without_steering(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in _ORIGIN_KEYS and not _STEERING_KEY.fullmatch(k)}
        return {k: _without_steering(v) for k, v in kept.items()}
    if isinstance(value, list):
        return [_without_steering(v) for v in value]
    return value
