"""GGUF bundles: one file with every tensor packed, the vocabulary, and what the model is.

For the same checkpoint at f16 the file says what llama.cpp's convert_hf_to_gguf.py says, key for key and tensor for
tensor. The differences, all meant, each with a test (tests/formats/test_converter.py, test_families_parity.py):

    what                               converter                          here, and why
    ---------------------------------  ---------------------------------  --------------------------------------------
    order of tensors                   as in the safetensors files        extra ones, then as in the family's graph, so
                                                                          that sharding does not change the file
    general.name and its parts         fall back on the folder's name     fall back on the name that the caller gives
                                                                          (a cache's folders are named by digests)
    general.quantized_by, base_model   what the model card says           also what `Facts` adds: a bundle derives from
                                                                          its source
    general.file_type                  f32, f16, bf16, q8_0, ternary      every encoding of llmpack
    rope_freqs.weight                  torch's float32 power              rounded correctly: up to 1 ulp apart
    add_bos_token                      only where the files say it;       always where a tokenizer.json exists, since
                                       false for 49152 tokens             llama.cpp's default depends on the kind of
                                                                          vocabulary; no exception by size
    BPE with byte fallback, without    one score for all pieces, no       scores by rank of merges, special tokens and
    tokenizer.model                    padding, special tokens normal     padding as for SentencePiece: otherwise
                                                                          llama.cpp finds other tokens or does not load
    tokenizer.ggml.pre                 check hash of what the tokenizer   also found with and without the opening token,
                                       adds by itself                     which re-saved tokenizers add or lose
    additional_chat_templates/         become named templates             not read: the intake opens no sub-folders
    scalars of a model card            by YAML's rules, "no" in a list    the text that was written, so that a version
                                       mended                             1.0 is "1.0"
    special token ids, vocabulary      warns and goes on                  stops: ids out of range, a vocabulary larger
                                                                          than the embedding, unigram models, two
                                                                          different chat templates
    tensor that does not fit           falls back on f16                  stops
    norms of Gemma in float16          one is added in float16            in float32
    Gemma 3 without windows            states a window all the same       states none, so that llama.cpp has none
    Gemma, Phi-3 without               stops                              SentencePiece's vocabulary, from
    tokenizer.model                                                       tokenizer.json

Nothing is rounded here but float to float: codes that a step chose are copied. Int groups whose levels a block of GGUF
has become such blocks with the same codes (`llmpack.encodings.conversion`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from llmpack.checkpoint.atomic import disk_errors, replaced_when_whole, require_space
from llmpack.checkpoint.tensors import chunks
from llmpack.encodings import encoding
from llmpack.encodings.conversion import as_blocks, block_encoding, is_exact
from llmpack.encodings.names import INT_NAMES, ORDERED_NAMES
from llmpack.errors import NumericalError, StepFailed
from llmpack.formats.facts import Facts
from llmpack.formats.gguf_container import Container, TensorEntry, Value, keys_nbytes, padded
from llmpack.formats.gguf_metadata import metadata
from llmpack.formats.gguf_vocab import vocabulary
from llmpack.formats.tokenizer_files import TokenizerFiles
from llmpack.models import family_of
from llmpack.models.graph import ModelGraph, TensorSpec
from llmpack.progress import QUIET, Progress

if TYPE_CHECKING:
    import numpy as np
    import torch

    from llmpack.checkpoint.checkpoint import Checkpoint
else:
    from llmpack.lazy import LazyModule

    np = LazyModule("numpy")
    torch = LazyModule("torch")

FLOATS = ("f32", "f16", "bf16")
CHUNK = 8 << 20


@dataclass(frozen=True)
class GgufFormat:
    """How checkpoints become GGUF files.

    floats  encoding of the matrices that are stored as floats; None keeps each as it is
    """

    name: ClassVar[str] = "gguf"
    file_name: ClassVar[str] = "model.gguf"

    floats: str | None = None

    def __post_init__(self) -> None:
        if self.floats not in (None, *FLOATS):
            raise ValueError(f"floats = {self.floats!r}; known: {', '.join(FLOATS)}")

    def encode_graph(self, graph: ModelGraph) -> ModelGraph:
        """The graph as it stands in the file: vectors in f32, float matrices as asked. Twice changes nothing.

        Raises StepFailed, naming every tensor for which GGUF has no name, or no type for its encoding.
        """
        homeless = [t.name for t in graph.tensors if t.gguf_name is None]
        unknown = [f"{t.name} ({t.encoding})" for t in graph.tensors if _type_of(t.encoding) is None]
        if homeless or unknown:
            listed = [f"without a name: {', '.join(homeless)}"] if homeless else []
            listed += [f"without a type: {', '.join(unknown)}"] if unknown else []
            without = {t.encoding for t in graph.tensors if _type_of(t.encoding) is None}
            twice = " (another encoding would be a second quantization of these codes)"
            twice = twice if without & set(INT_NAMES) else ""
            twice += ", whose blocks are of neighbouring columns" if without & set(ORDERED_NAMES) else ""
            told = f"a GGUF file cannot hold tensors {'; '.join(listed)}{twice}"
            cure = "choose another encoding in the step that quantizes, or another format"
            cure += ", or round again in a step with requantize = true" if without & set(INT_NAMES) else ""
            raise StepFailed(f"{told}; {cure}")
        return graph.with_encodings(self._encoding_in_file)

    def _encoding_in_file(self, spec: TensorSpec) -> str:
        if len(spec.shape) <= 1 or spec.part == "norm":
            return "f32"  # llama.cpp computes with these in single precision and reads nothing else
        if self.floats is not None and spec.encoding in FLOATS:
            return self.floats
        return block_encoding(spec.encoding) or spec.encoding

    def totals(self, graph: ModelGraph) -> dict[str, tuple[int, int]]:
        """Tensors and bytes in the file, by encoding."""
        found: dict[str, tuple[int, int]] = {}
        for spec in self.encode_graph(graph).tensors:
            count, nbytes = found.get(spec.encoding, (0, 0))
            found[spec.encoding] = (count + 1, nbytes + spec.nbytes)
        return found

    def container(self, graph: ModelGraph, checkpoint: Checkpoint, facts: Facts) -> Container:
        """Everything of the file but its rows; reads the checkpoint's tokenizer files and no tensor.

        graph  may be what a step's preview promises: its config and encodings count, not the checkpoint's
        """
        return self._container(graph, facts, self._vocabulary(graph, checkpoint))

    def _container(self, graph: ModelGraph, facts: Facts, words: dict[str, Value]) -> Container:
        graph = self.encode_graph(graph)
        family = family_of(graph.config)
        extra = family.extra_tensors(graph.config)
        entries = [TensorEntry(name, values.shape, 0, values.nbytes) for name, values in extra.items()]
        for spec in graph.tensors:
            kind = encoding(spec.encoding)
            if spec.gguf_name is None or kind.ggml_type is None:  # encode_graph has refused these
                raise AssertionError(spec.name)
            entries.append(TensorEntry(spec.gguf_name, spec.shape, kind.ggml_type, kind.nbytes(spec.shape)))
        keys = metadata(
            facts,
            family.gguf_arch,
            family.hyperparameters(graph.config),
            graph.tensors,
            sum(math.prod(entry.shape) for entry in entries),
        )
        return Container(keys | words, tuple(entries))

    def _vocabulary(self, graph: ModelGraph, checkpoint: Checkpoint) -> dict[str, Value]:
        files = TokenizerFiles.read(checkpoint.folder, checkpoint.tokenizer_files)
        return vocabulary(files, graph.config, family_of(graph.config).tokenizer)

    def vocabulary_bytes(self, graph: ModelGraph, checkpoint: Checkpoint) -> int:
        """Bytes of the keys that hold the vocabulary, which are the same whatever becomes of the blocks."""
        return keys_nbytes(self._vocabulary(graph, checkpoint))

    def nbytes(self, graph: ModelGraph, checkpoint: Checkpoint, facts: Facts, words: int | None = None) -> int:
        """Exact size of the file that `write` will make; `words`: `vocabulary_bytes`, where they are known."""
        if words is None:
            return self.container(graph, checkpoint, facts).nbytes
        return self._container(graph, facts, {}).nbytes_with(words)

    def write(
        self, checkpoint: Checkpoint, graph: ModelGraph, path: Path, facts: Facts, progress: Progress = QUIET
    ) -> Container:
        """Write the file, a few rows at a time; it appears under `path` when it is whole. Returns its head.

        Raises StepFailed for a tensor whose stored encoding is not the graph's and no float, NumericalError for
        numbers beyond the range of a smaller float, EnvironmentProblem on a full disk.
        """
        graph = self.encode_graph(graph)
        container = self.container(graph, checkpoint, facts)
        extra = family_of(graph.config).extra_tensors(graph.config)
        require_space(path.parent, container.nbytes)
        with (
            disk_errors(path.parent, container.nbytes),
            replaced_when_whole(path) as temporary,
            temporary.open("wb") as file,
            progress.task("writing GGUF", container.nbytes) as done,
        ):
            done(file.write(container.header))
            for values in extra.values():
                file.write(values.astype("<f4").tobytes() + bytes(padded(values.nbytes) - values.nbytes))
            for spec in graph.tensors:
                written = 0
                for rows in file_rows(checkpoint, spec):
                    file.write(np.ascontiguousarray(rows).data)
                    written += rows.nbytes
                file.write(bytes(padded(written) - written))
                checkpoint.release([spec.name])
                done(padded(written))
            if file.tell() != container.nbytes:
                raise AssertionError(f"{path}: {file.tell()} bytes written, {container.nbytes} announced")
        return container


def file_rows(checkpoint: Checkpoint, spec: TensorSpec, nbytes: int = CHUNK) -> Iterator[np.ndarray]:
    """The packed rows of a tensor as the file holds them, in runs of about `nbytes`; uint8 [rows, row bytes].

    spec  with the encoding that it has in the file

    Rows are put in GGUF's order, and norms get what those of a file have more. Where encodings differ, floats are
    converted. Raises as `GgufFormat.write` does.
    """
    stored = checkpoint.tensors[spec.name]
    packed, spec = checkpoint.packed(spec.name), _as_matrix(spec)
    packed = packed.reshape(spec.shape[0], -1)
    regrouped = block_encoding(stored.encoding) == spec.encoding
    if stored.encoding != spec.encoding and not regrouped and not {stored.encoding, spec.encoding} <= set(FLOATS):
        raise StepFailed(
            f"{spec.name} is stored as {stored.encoding} and the bundle wants {spec.encoding}; "
            "only a quantize step turns the one into the other"
        )
    family = family_of(checkpoint.config)
    order = family.row_order(replace(spec, shape=stored.shape), checkpoint.config)
    offset = family.norm_offset if spec.part == "norm" else 0.0
    step = max(1, nbytes // max(1, packed.shape[1]))
    for start in range(0, len(packed), step):
        rows = packed[start : start + step] if order is None else packed[order[start : start + step]]
        if regrouped:
            yield as_blocks(rows, stored.encoding, spec.shape[-1])
            continue
        same = stored.encoding == spec.encoding and not offset
        yield rows if same else _converted(rows, stored.encoding, spec, offset)


def rounded_minima(checkpoint: Checkpoint, graph: ModelGraph) -> tuple[int, float]:
    """How many matrices of int groups get minima rounded to float16 in the file, and what that costs.

    The cost is the root of the squared differences as a share of the root of all squared numbers.
    """
    count, lost, total = 0, 0.0, 0.0
    for spec in graph.tensors:
        stored = checkpoint.tensors[spec.name].encoding
        if block_encoding(stored) != spec.encoding or is_exact(stored):
            continue
        count += 1
        packed = checkpoint.packed(spec.name)
        for rows in chunks(packed):
            before = encoding(stored).decode(rows, spec.shape[-1])
            after = encoding(spec.encoding).decode(as_blocks(rows, stored, spec.shape[-1]), spec.shape[-1])
            lost += float((after - before).square().sum(dtype=torch.float64))
            total += float(before.square().sum(dtype=torch.float64))
        checkpoint.release([spec.name])
    return count, (lost / total) ** 0.5 if total else 0.0


def _type_of(name: str) -> int | None:
    """The type id in a GGUF file of an encoding or of the blocks that hold its codes."""
    return encoding(block_encoding(name) or name).ggml_type


def _as_matrix(spec: TensorSpec) -> TensorSpec:
    """A vector as a matrix of one column, so that its elements are rows, which can be put in order."""
    return replace(spec, shape=(*spec.shape, 1)) if len(spec.shape) == 1 else spec


def _converted(rows: np.ndarray, stored: str, spec: TensorSpec, offset: float) -> np.ndarray:
    values = encoding(stored).decode(rows, spec.shape[-1]) + offset
    try:
        return encoding(spec.encoding).encode(values)
    except ValueError as beyond:
        hint = 'keep these tensors in bf16 or f32 (`floats = "bf16"`), or quantize them'
        raise NumericalError(f"{spec.name}: {beyond}; {hint}") from beyond
