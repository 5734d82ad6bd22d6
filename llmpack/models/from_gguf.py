"""From a GGUF file to a checkpoint folder: numbers decoded, rows put back in order, config and tokenizer rebuilt.

What llama.cpp computes from the blocks of the file is what the checkpoint says in plain numbers; float32 holds them
exactly. Tensors stream: in memory is one block of the model, decoded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.checkpoint.writing import CheckpointWriter
from llmpack.encodings import ENCODINGS, encoding
from llmpack.errors import InputRejected, Problem
from llmpack.models import FAMILIES, family_of
from llmpack.models.family import STORED, Family
from llmpack.models.gguf_tokenizer import tokenizer_files
from llmpack.models.graph import ModelGraph, TensorSpec
from llmpack.progress import QUIET, Progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

FREQUENCIES = "rope_freqs.weight"
CHUNK = 1 << 22
"""Numbers decoded at once: decoding needs several times the memory of its result."""


def block_encodings(gguf: GgufFile) -> dict[str, int]:
    """How many tensors are stored as blocks of codes, by encoding; empty for a file that is not quantized."""
    return {name: count for name, count in gguf.encodings.items() if name not in ("f32", "f16", "bf16")}


def gguf_graph(gguf: GgufFile, dtype: str = "f32") -> ModelGraph:
    """The model of a GGUF file as `import_gguf` would store it; torch-free.

    Raises InputRejected for an unknown architecture (``unsupported-arch``), settings or encodings that are not
    supported, and tensors that are missing, not part of the model, or of another shape.
    """
    family = _family(gguf)
    config = _config(family, gguf, dtype)
    graph = family.graph(config)
    problems = []
    expected = {spec.gguf_name: spec for spec in graph.tensors}
    for name, spec in expected.items():
        if name is None:
            problems.append(Problem(f"GGUF has no place for `{spec.name}`", rule="unsupported-config"))
        elif name not in gguf.tensors:
            problems.append(Problem(f"tensor `{name}` {list(spec.shape)} is missing", rule="weights-incomplete"))
        elif gguf.tensors[name].shape != spec.shape:
            text = f"tensor `{name}` is {list(gguf.tensors[name].shape)}; the metadata implies {list(spec.shape)}"
            problems.append(Problem(text, rule="weights-misshaped"))
        elif gguf.tensors[name].encoding not in ENCODINGS:
            text = f"tensor `{name}` is stored as {gguf.tensors[name].encoding}; decoded are {', '.join(ENCODINGS)}"
            problems.append(Problem(text, rule="unsupported-encoding"))
    problems += [
        Problem(f"tensor `{name}` is not part of {family.name} with this metadata", rule="weights-incomplete")
        for name in gguf.tensors
        if name not in expected and name != FREQUENCIES
    ]
    if problems:
        raise InputRejected([Problem(p.message, p.path, str(gguf.path), p.rule) for p in problems])
    return graph


def _family(gguf: GgufFile) -> Family:
    arch = gguf.metadata.get("general.architecture")
    found = {family.gguf_arch: family for _, family in FAMILIES.items() if family.from_gguf}
    if arch not in found:
        text = f"general.architecture is {arch!r}; supported: {', '.join(found)}"
        raise InputRejected([Problem(text, where=str(gguf.path), rule="unsupported-arch")])
    return found[arch]()


def _config(family: Family, gguf: GgufFile, dtype: str) -> dict[str, Any]:
    torch_name = next((name for name, stored in STORED.items() if stored == dtype), None)
    if torch_name is None:
        raise ValueError(f"a checkpoint of decoded numbers is f32, f16 or bf16, not {dtype!r}")
    divisors = None
    if FREQUENCIES in gguf.tensors:
        tensor = gguf.tensors[FREQUENCIES]
        if tensor.encoding != "f32" or len(tensor.shape) != 1:
            text = f"{FREQUENCIES} is {tensor.encoding} {list(tensor.shape)}, not a vector of f32"
            raise InputRejected([Problem(text, where=str(gguf.path), rule="weights-misshaped")])
        divisors = gguf.packed(FREQUENCIES).copy().view("<f4").reshape(-1)
    config = family.config_from_gguf(gguf.metadata, divisors)
    return config | dict(family.config_of_names(gguf.tensors)) | {"torch_dtype": torch_name}


def decode_rows(gguf: GgufFile, spec: TensorSpec, order: np.ndarray | None, dtype: torch.dtype) -> Tensor:
    """One tensor in checkpoint order and shape; decoded a few rows at a time.

    order  row i of the file is row ``order[i]`` of the result, None for the same order

    Raises InputRejected for finite numbers that `dtype` cannot hold.
    """
    name, columns = str(spec.gguf_name), spec.shape[-1]
    packed, how = gguf.packed(name), encoding(gguf.tensors[name].encoding)
    decoded = torch.empty((len(packed), columns), dtype=dtype)
    step = max(1, CHUNK // columns)
    for start in range(0, len(packed), step):
        values = how.decode(packed[start : start + step], columns)
        rows = decoded[start : start + step]
        rows.copy_(values)
        if dtype != torch.float32 and not bool((torch.isfinite(rows) == torch.isfinite(values)).all()):
            text = f"tensor `{name}` has numbers that {dtype} cannot hold; import it as f32 or bf16"
            raise InputRejected([Problem(text, where=str(gguf.path), rule="non-finite")])
    gguf.release([name])
    decoded = decoded.reshape(spec.shape)
    if order is None:
        return decoded
    ordered = torch.empty_like(decoded)
    ordered[torch.from_numpy(order)] = decoded
    return ordered


def import_gguf(gguf: GgufFile, folder: Path, dtype: str = "f32", progress: Progress = QUIET) -> Checkpoint:
    """Write the model of a GGUF file as a checkpoint and open it.

    folder  new, or with the shards of an import that was killed, which are kept
    dtype   "f32" holds every decoded number exactly; "f16" and "bf16" round

    Raises InputRejected as `gguf_graph` and `tokenizer_files` do. What the file says about its licence and its
    encodings stays with the `GgufFile` (`gguf_licence`, `block_encodings`).
    """
    graph = gguf_graph(gguf, dtype)
    family = family_of(graph.config)
    files = tokenizer_files(gguf.metadata, str(gguf.path))
    stored: torch.dtype = getattr(torch, graph.config["torch_dtype"])
    with tempfile.TemporaryDirectory(prefix="llmpack-") as temporary:
        paths = []
        for name, data in files.items():
            paths.append(Path(temporary, name))
            paths[-1].write_bytes(data)
        writer = CheckpointWriter(folder, _origin(Path(temporary), graph.config, tuple(paths)))
        with progress.task("decoding the source", graph.parameters) as done:
            for shard, specs in _shards(graph).items():
                if writer.finished(shard) is None:
                    writer.write(shard, {s.name: _decoded(gguf, family, graph, s, stored) for s in specs})
                done(sum(spec.parameters for spec in specs))
        return writer.finish()


def _decoded(gguf: GgufFile, family: Family, graph: ModelGraph, spec: TensorSpec, dtype: torch.dtype) -> Tensor:
    """A tensor as the checkpoint has it; norms are decoded and shifted in float32."""
    order = family.row_order(spec, graph.config)
    if spec.part != "norm" or not family.norm_offset:
        return decode_rows(gguf, spec, order, dtype)
    return (decode_rows(gguf, spec, order, torch.float32) - family.norm_offset).to(dtype)


def _shards(graph: ModelGraph) -> dict[str, tuple[TensorSpec, ...]]:
    """A shard per block, and one for each tensor outside, which may be the largest of all."""
    outside = {f"outside-{spec.part}": (spec,) for spec in graph.outside}
    return outside | {f"block-{index:04d}": graph.block(index) for index in range(graph.block_count)}


def _origin(folder: Path, config: Mapping[str, Any], files: tuple[Path, ...]) -> Checkpoint:
    """A checkpoint without tensors: the config and tokenizer files that a writer starts from."""
    nothing: Mapping[str, Any] = MappingProxyType({})
    return Checkpoint(folder, MappingProxyType(dict(config)), nothing, files, {}, {})
