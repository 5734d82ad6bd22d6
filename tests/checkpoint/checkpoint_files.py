"""Small files made by hand, byte by byte where that matters, sharing no code with what is tested."""

import json
import struct
from pathlib import Path

import numpy as np

from llmpack.errors import InputRejected

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 12,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
TOKENS = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [{"id": 0, "content": "<s>", "special": True}, {"id": 1, "content": "</s>", "special": True}],
    "model": {"type": "BPE", "vocab": TOKENS, "merges": ["a b"]},
}
DTYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "U8": "u1"}


def safetensors_bytes(tensors, metadata=None):
    """A file with these arrays, in the order given."""
    names = {np.dtype(code): name for name, code in DTYPES.items()}
    header, data = {}, b""
    if metadata:
        header["__metadata__"] = metadata
    for name, array in tensors.items():
        raw = array.tobytes()
        header[name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return file_bytes(json.dumps(header).encode(), data)


def file_bytes(header, data):
    return struct.pack("<Q", len(header)) + header + data


def some_tensors():
    generator = np.random.default_rng(0)
    return {
        "model.embed_tokens.weight": generator.standard_normal((12, 8)).astype("<f4"),
        "model.norm.weight": generator.standard_normal(8).astype("<f2"),
        "count": np.array(7, dtype="<i8"),
    }


def write_folder(folder: Path, config=None, tokenizer=TOKENIZER):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    (folder / "model.safetensors").write_bytes(safetensors_bytes(some_tensors()))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def write_sharded(folder: Path):
    """The same tensors in two shards with their index."""
    write_folder(folder)
    (folder / "model.safetensors").unlink()
    tensors = some_tensors()
    first = {"count": tensors.pop("count")}
    placed = {}
    for name, part in (("model-00001-of-00002.safetensors", first), ("model-00002-of-00002.safetensors", tensors)):
        (folder / name).write_bytes(safetensors_bytes(part))
        placed |= dict.fromkeys(part, name)
    write_index(folder, placed)
    return folder


def write_index(folder: Path, placed):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def is_refused(read, *arguments):
    """True if reading ends in an InputRejected that names its problems; any other exception passes through."""
    try:
        read(*arguments)
    except InputRejected as refusal:
        return bool(refusal.problems)
    return False


def rules(refusal):
    """The rule ids of an InputRejected that pytest caught."""
    return {problem.rule for problem in refusal.value.problems}
