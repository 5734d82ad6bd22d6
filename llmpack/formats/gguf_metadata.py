"""The ``general.*`` keys and the hyperparameters of a GGUF file, in an order that never varies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from llmpack.formats.facts import RELATED, SAMPLING, Facts, general_keys
from llmpack.formats.gguf_container import Value, int32, string, strings, uint32, value_of
from llmpack.formats.model_name import size_label
from llmpack.models.graph import TensorSpec

QUANTIZATION_VERSION = 2  # of ggml's block formats

# The id by which llama.cpp names a file after the encoding that most of it has (llama.h, llama_ftype);
# for k-quants the plain kind (S), since no preset of llama-quantize chose the mixture.
FILE_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q2_k": 10,
    "q3_k": 11,
    "q4_k": 14,
    "q5_k": 16,
    "q6_k": 18,
    "iq4_nl": 25,
    "iq4_xs": 30,
    "bf16": 32,
}
GUESSED = 1024  # what llama.cpp calls a file whose type has no name


def file_type(tensors: Iterable[TensorSpec]) -> int:
    """The type of a file: that of the encoding which holds most numbers of the blocks' matrices."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        if len(tensor.shape) > 1:
            counts[tensor.encoding] += tensor.parameters if tensor.block is not None else 0
    return FILE_TYPES.get(counts.most_common(1)[0][0], GUESSED) if counts else GUESSED


def metadata(
    facts: Facts, architecture: str, hyperparameters: Mapping[str, Any], tensors: Iterable[TensorSpec], parameters: int
) -> dict[str, Value]:
    """Every key but those of the tokenizer.

    hyperparameters  as the family gives them (`Family.hyperparameters`)
    tensors          as they will be encoded in the file
    parameters       numbers in the whole file, for the size label
    """
    keys = {"general.architecture": string(architecture), "general.type": string("model")}
    keys |= _general(facts, parameters)
    keys |= {key: value_of(value) for key, value in hyperparameters.items()}
    keys["general.file_type"] = uint32(file_type(tensors))
    keys["general.quantization_version"] = uint32(QUANTIZATION_VERSION)
    return keys


def _general(facts: Facts, parameters: int) -> dict[str, Value]:
    # counts are signed here, unlike everywhere else
    keys = {
        f"general.sampling.{key}": int32(int(facts.sampling[key])) if kind is int else value_of(facts.sampling[key])
        for key, (_, kind) in SAMPLING.items()
        if key in facts.sampling
    }
    for fact, key in general_keys().items():
        text = getattr(facts, fact)
        if fact == "size_label":
            text = text or size_label(parameters)
        if text:
            keys[f"general.{key}"] = string(text)
    for kind, entries in (("base_model", facts.base_models), ("dataset", facts.datasets)):
        if entries is not None:
            keys[f"general.{kind}.count"] = uint32(len(entries))
        for index, entry in enumerate(entries or ()):
            keys |= {f"general.{kind}.{index}.{key}": string(entry[key]) for key in RELATED if entry.get(key)}
    for kind, texts in (("tags", facts.tags), ("languages", facts.languages)):
        if texts:
            keys[f"general.{kind}"] = strings(texts)
    return keys
