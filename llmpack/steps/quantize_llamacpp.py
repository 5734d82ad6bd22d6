"""quantize.llamacpp: llama.cpp's own rounding with its importance matrix, so that the baseline is one word away."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.writing import CheckpointWriter
from llmpack.encodings import ENCODINGS, encoding
from llmpack.models.graph import ModelGraph, TensorSpec
from llmpack.runtime.llama import LlamaRuntime
from llmpack.steps.blocks import Treated, compute_threads, packed_as, write_block, write_outside
from llmpack.steps.quantize import FLOATS, Quantize
from llmpack.steps.quantize_rtn import importances
from llmpack.steps.step import Workbench

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")


class QuantizeLlamacpp(Quantize):
    """Let llama.cpp round, tensor by tensor, as ``llama-quantize --pure --imatrix`` does.

    The importance of each column is its mean squared input over calibration text in the model as it was, which is
    what ``llama-imatrix`` gathers. Runs in a child process; needs the extra `run`.
    """

    version: ClassVar[int] = 1

    importance: bool = True
    """Weigh inputs by calibration text. Without it no text is needed."""

    @property
    def needs_corpus(self) -> bool:
        """Only to weigh inputs."""
        return self.importance

    @property
    def walks(self) -> bool:
        """To weigh inputs."""
        return self.importance

    def encoding_problem(self, name: str) -> str | None:
        """llama.cpp rounds to the types of GGUF alone."""
        return None if ENCODINGS.load(name).ggml_type is not None else f"llama.cpp has no type {name}"

    def run(self, checkpoint: Checkpoint, graph: ModelGraph, bench: Workbench) -> Checkpoint:
        """Write the rounded checkpoint to ``bench.folder``."""
        target = self.preview(graph)
        writer = CheckpointWriter(bench.folder, checkpoint)
        with compute_threads(bench.threads), LlamaRuntime() as runtime:

            def encode(spec: TensorSpec, values: Tensor, importance: Tensor | None = None) -> np.ndarray:
                return _rounded(runtime, spec, values, importance, bench.threads)

            write_outside(writer, checkpoint, target, encode, bench.progress)
            for block, weights in importances(checkpoint, graph, bench, writer, self.importance):
                treated = {}
                for spec in target.block(block):
                    if spec.is_linear:
                        W = checkpoint.read(spec.name).to(torch.float32)
                        data = encode(spec, W, weights.get(str(spec.inputs)))
                        treated[spec.name] = Treated(packed_as(spec, data))
                write_block(writer, checkpoint, target, block, treated)
        return writer.finish()


def _rounded(
    runtime: LlamaRuntime, spec: TensorSpec, values: Tensor, importance: Tensor | None, threads: int
) -> np.ndarray:
    if spec.encoding in FLOATS:
        return encoding(spec.encoding).encode(values)
    kind = ENCODINGS.load(spec.encoding).ggml_type
    assert kind is not None  # `encoding_problem` refused it before
    weights = None if importance is None else importance.numpy()
    return runtime.quantize_rows(values.numpy(), kind, weights, threads=threads)
