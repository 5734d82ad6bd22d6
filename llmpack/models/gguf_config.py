"""From the keys of a GGUF file to a config.json: the inverse of `Family.hyperparameters`.

Every key of the architecture must be understood: one that is not would change the model without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmpack.errors import InputRejected, Problem
from llmpack.models.rope import Rope, rope_of_divisors

if TYPE_CHECKING:
    import numpy as np

    from llmpack.models.family import Family
else:
    from llmpack.lazy import LazyModule

    np = LazyModule("numpy")

SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
EPSILON = "attention.layer_norm_rms_epsilon"
WIDTHS = ("attention.key_length", "attention.value_length", "rope.dimension_count")
"""Keys that all give the width of a head."""

KNOWN = {
    *SIZES,
    *WIDTHS,
    EPSILON,
    "attention.head_count_kv",
    "vocab_size",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",  # what was before the scaling; nothing is computed from it here
    "rope.scaling.finetuned",
    "tensor_data_layout",  # where the file was converted from; the order of rows is always ggml's
}

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def shortest(value: float) -> float:
    """The shortest decimal that is this float32: 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def read_config(family: Family, metadata: Mapping[str, Any], divisors: np.ndarray | None) -> dict[str, Any]:
    """See `Family.config_from_gguf`."""
    arch = family.gguf_arch
    keys = {key.removeprefix(f"{arch}."): value for key, value in metadata.items() if key.startswith(f"{arch}.")}
    known = KNOWN | {setting.gguf for setting in family.settings}
    problems = [
        Problem(
            f"{arch}.{key} is {str(keys[key])[:40]}; {family.name} has no such setting here", rule="unsupported-config"
        )
        for key in keys
        if key not in known
    ]
    odd = [key for key in (*SIZES, *WIDTHS, "attention.head_count_kv", "vocab_size") if _odd(keys.get(key))]
    problems += [
        Problem(f"{arch}.{key} is {str(keys[key])[:40]}, not one whole number", rule="unsupported-config")
        for key in odd
    ]
    missing = [key for key in (*SIZES, EPSILON) if key not in keys]
    problems += [Problem(f"{arch}.{key} is missing", rule="config-range") for key in missing]
    if problems:
        raise InputRejected(problems)
    return _config(family, metadata, keys, divisors)


def _odd(value: Any) -> bool:
    return value is not None and (isinstance(value, bool) or not isinstance(value, int))


def _config(
    family: Family, metadata: Mapping[str, Any], keys: Mapping[str, Any], divisors: np.ndarray | None
) -> dict[str, Any]:
    heads, hidden = keys["attention.head_count"], keys["embedding_length"]
    widths = {keys[key] for key in WIDTHS if key in keys} or {hidden // heads if heads else 0}
    if len(widths) > 1:
        text = f"heads of different widths {sorted(widths)} in {', '.join(WIDTHS)}"
        raise InputRejected([Problem(text, rule="unsupported-config")])
    (head_dim,) = widths
    tokens = metadata.get("tokenizer.ggml.tokens")
    special = {
        key: metadata.get(f"tokenizer.ggml.{'padding' if key.startswith('pad') else key[:3]}_token_id")
        for key in TOKENS
    }
    stated = "attention.key_length" in keys or "head_dim" in family.defaults or head_dim * heads != hidden
    found = {s.config: (s, keys[s.gguf]) for s in family.settings if s.gguf in keys}
    settings = {key: None if value == s.null else value for key, (s, value) in found.items()}
    config: dict[str, Any] = {
        "architectures": list(family.architectures[:1]),
        "model_type": family.model_type,
        **{name: keys[key] for key, name in SIZES.items()},
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        **({"head_dim": head_dim} if stated else {}),
        **dict([family.activation]),
        **{key: shortest(value) if isinstance(value, float) else value for key, value in settings.items()},
        "rms_norm_eps": shortest(keys[EPSILON]),
        "vocab_size": keys.get("vocab_size", 0 if tokens is None else len(tokens)),
        **_rope(keys, head_dim, divisors).config(),
        **{key: value for key, value in special.items() if value is not None},
    }
    return config


def _rope(keys: Mapping[str, Any], head_dim: int, divisors: np.ndarray | None) -> Rope:
    theta = shortest(keys.get("rope.freq_base", 10_000.0))
    kind = keys.get("rope.scaling.type", "none")
    if divisors is not None:
        rope = rope_of_divisors(theta, head_dim, divisors)
        if rope is None or kind != "none":
            text = "rope_freqs.weight holds divisors that are not those of Llama 3's scaling; they fit no config.json"
            raise InputRejected([Problem(text, rule="unsupported-config")])
        return rope
    if kind == "none":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, "linear", shortest(keys.get("rope.scaling.factor", 1.0)))
    text = f"rope scaling {str(kind)[:40]!r} is not supported; supported: none, linear, and Llama 3's"
    raise InputRejected([Problem(text, rule="unsupported-config")])
