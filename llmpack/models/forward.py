"""The forward pass: transformers' own blocks, one at a time.

The model is built on the meta device, where it has shapes and no numbers. Whatever a block receives beside
the hidden states (masks, rotary tables, positions) is captured from the model's own forward pass, run with
recorders in place of its blocks; nothing of a model's arithmetic is written a second time here.

Attention is what transformers takes by default: torch's scaled dot product ("sdpa"), whose memory grows with the
length of a sequence, or "eager", where it grows with the square, for models that cap their scores (Gemma 2).
Computation is float32 unless told otherwise.

Memory: one block, the rows of the embedding that a batch uses, the last norm; for logits also the head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.tensors import decode
from llmpack.models import family_of
from llmpack.models.graph import ModelGraph, TensorSpec
from llmpack.profile import phase
from llmpack.progress import QUIET, Progress

if TYPE_CHECKING:
    import accelerate
    import torch
    import transformers
    from torch import Tensor, nn
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")
    nn = LazyModule("torch.nn")
    accelerate = LazyModule("accelerate")
    transformers = LazyModule("transformers")

BATCH_TOKENS = 2048
"""Tokens that run through a block at once. Fixed, because the order of float sums follows from it."""


def batches(count: int, length: int) -> Iterator[slice]:
    """Slices of `count` sequences of `length` tokens, about `BATCH_TOKENS` each."""
    step = max(1, BATCH_TOKENS // length)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


@dataclass(frozen=True)
class Frame:
    """What each block receives beside the hidden states, for one shape of batch: keywords by block."""

    keywords: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Block:
    """One block with its weights: transformers' module, and its index in the model."""

    index: int
    module: nn.Module


def skeleton(config: Mapping[str, Any]) -> transformers.PreTrainedModel:
    """transformers' model of a config.json on the meta device; rotary tables are real."""
    settings = {k: copy.deepcopy(v) for k, v in config.items() if k not in ("torch_dtype", "dtype")}
    with accelerate.init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**settings))
    # only some rows of the embedding are there at a time, and that of the padding token may not be
    model.get_input_embeddings().padding_idx = None
    return model.eval().requires_grad_(False)


def _recorder(like: nn.Module, seen: list[dict[str, Any]], hidden: list[Tensor]) -> nn.Module:
    """A module that stands where a block stood, notes what it is called with and gives its input back."""

    class Recorder(nn.Module):
        def __getattr__(self, name: str) -> Any:
            # models ask their blocks for settings such as `attention_type`
            return getattr(like, name) if name in vars(like) else super().__getattr__(name)

        def forward(self, hidden_states: Tensor, **keywords: Any) -> Tensor:
            seen.append(keywords)
            hidden.append(hidden_states)
            return hidden_states

    return Recorder()


class Forward:
    """Runs a checkpoint, block by block.

    dtype   of weights and hidden states
    device  where blocks are put
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        graph: ModelGraph,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.checkpoint, self.graph = checkpoint, graph
        self.dtype = dtype or torch.float32
        self.device = torch.device(device)
        self._family = family_of(graph.config)
        self._model = skeleton(graph.config)
        self._embedding = self._outside("embedding")
        self._seen: list[dict[str, Any]] = []
        self._hidden: list[Tensor] = []
        self._blocks = self._take_blocks()
        self._frames: dict[tuple[int, int], Frame] = {}
        for spec in graph.outside:
            if spec.part == "norm":
                self._put(spec, self._read(spec.name))

    def _outside(self, part: str) -> TensorSpec:
        return next(spec for spec in self.graph.outside if spec.part == part)

    def _take_blocks(self) -> list[nn.Module]:
        path = self._family.block_path
        blocks = list(self._model.get_submodule(path).children())
        recorders = [_recorder(block, self._seen, self._hidden) for block in blocks]
        self._model.set_submodule(path, nn.ModuleList(recorders))
        return blocks

    def _read(self, name: str) -> Tensor:
        values = self.checkpoint.read(name).to(device=self.device, dtype=self.dtype)
        self.checkpoint.release([name])
        return values

    def _put(self, spec: TensorSpec, values: Tensor) -> None:
        path, _, name = self._family.module_name(spec.name).rpartition(".")
        setattr(self._model.get_submodule(path), name, nn.Parameter(values, requires_grad=False))

    def _enter(self, tokens: Tensor, change: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Frame]:
        """The hidden states that reach the first block, and the frame of this shape.

        Only the rows of the embedding that `tokens` name are decoded, and the ids are renumbered to match.
        """
        rows, ids = torch.unique(tokens, return_inverse=True)
        packed = self.checkpoint.packed(self._embedding.name)[rows.numpy()]
        shape = (len(rows), self._embedding.shape[1])
        values = decode(packed, self._embedding.encoding, shape).to(device=self.device, dtype=self.dtype)
        self.checkpoint.release([self._embedding.name])
        self._put(self._embedding, values if change is None else change(values))
        self._seen.clear()
        self._hidden.clear()
        with torch.no_grad():
            self._model.base_model(input_ids=ids.to(self.device), use_cache=False)
        frame, hidden = Frame(tuple(self._seen)), self._hidden[0]
        self._put(self._embedding, torch.empty(shape, device="meta"))
        self._seen.clear()
        self._hidden.clear()
        return hidden, frame

    def embed(self, tokens: Tensor, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Hidden states [B, T, D] before the first block, of tokens [B, T] int64.

        change  what is done to the rows of the embedding [n, D] that are looked up, for a trial
        """
        hidden, frame = self._enter(tokens, change)
        self._frames = {(tokens.shape[0], tokens.shape[1]): frame}
        return hidden

    def frame(self, count: int, length: int) -> Frame:
        """What blocks receive beside hidden states [count, length, D]. Kept for the two shapes used last."""
        shape = (count, length)
        if shape not in self._frames:
            _, frame = self._enter(torch.zeros(shape, dtype=torch.int64))
            self._frames = dict([*self._frames.items(), (shape, frame)][-2:])
        return self._frames[shape]

    def load_block(self, index: int) -> Block:
        """A block with its weights, decoded where they are packed; the pages of the file are released."""
        path = f"{self._family.block_path}.{index}."
        config = self._model.config
        # the config is shared: attention looks its implementation up in it
        module = copy.deepcopy(self._blocks[index], {id(config): config})
        with phase("load weights", numbers=sum(spec.parameters for spec in self.graph.block(index))):
            state = {
                self._family.module_name(spec.name).removeprefix(path): self._read(spec.name)
                for spec in self.graph.block(index)
            }
        module.load_state_dict(state, strict=True, assign=True)
        return Block(index, module.requires_grad_(False).eval())

    def module_path(self, spec: TensorSpec) -> str:
        """Where a tensor of a block is, below `Block.module`."""
        path = f"{self._family.block_path}.{spec.block}."
        return self._family.module_name(spec.name).removeprefix(path)

    def run(self, block: Block, hidden: Tensor, frame: Frame | None = None) -> Tensor:
        """Hidden states [B, T, D] after a block, in the dtype of the forward pass."""
        frame = frame or self.frame(hidden.shape[0], hidden.shape[1])
        tokens = hidden.shape[0] * hidden.shape[1]
        weights = sum(spec.parameters for spec in self.graph.block(block.index) if spec.is_linear)
        with torch.no_grad(), phase("forward", tokens=tokens, flops=2.0 * tokens * weights):
            return self._through(block, hidden.to(device=self.device, dtype=self.dtype), frame)

    def _through(self, block: Block, hidden: Tensor, frame: Frame) -> Tensor:
        output: Tensor = block.module(hidden, **frame.keywords[block.index])
        return output

    def learning(self, block: Block, hidden: Tensor) -> Tensor:
        """As `run`; gradients reach those parameters of the block that require them, if the caller wants gradients."""
        frame, tokens = self.frame(hidden.shape[0], hidden.shape[1]), hidden.shape[0] * hidden.shape[1]
        weights = sum(spec.parameters for spec in self.graph.block(block.index) if spec.is_linear)
        with phase("learning", tokens=tokens, flops=(6.0 if torch.is_grad_enabled() else 2.0) * tokens * weights):
            return self._through(block, hidden.to(device=self.device, dtype=self.dtype), frame)

    def pull_back(self, block: Block, hidden: Tensor, gradient: Tensor) -> Tensor:
        """The gradient by a block's input [B, T, D], from that by its output; the block runs forward once more.

        Hooks of modules inside the block see both passes.
        """
        given = hidden.to(device=self.device, dtype=self.dtype).detach().requires_grad_()
        frame = self.frame(hidden.shape[0], hidden.shape[1])
        tokens = hidden.shape[0] * hidden.shape[1]
        weights = sum(spec.parameters for spec in self.graph.block(block.index) if spec.is_linear)
        with torch.enable_grad(), phase("backward", tokens=tokens, flops=4.0 * tokens * weights):
            output = self._through(block, given, frame)
            (result,) = torch.autograd.grad(output, given, gradient.to(output))
        return result

    def finish(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] after the last norm."""
        with torch.no_grad():
            return self._finish(hidden)

    def _finish(self, hidden: Tensor) -> Tensor:
        last = [spec for spec in self.graph.outside if spec.part == "norm"][-1]
        norm = self._model.get_submodule(self._family.module_name(last.name).rpartition(".")[0])
        normed: Tensor = norm(hidden.to(device=self.device, dtype=self.dtype))
        return normed

    @cached_property
    def _head(self) -> Tensor:
        tied = "output" not in {spec.part for spec in self.graph.outside}
        return self._read(self._outside("embedding" if tied else "output").name)

    def head(self) -> Tensor:
        """[V, D]: the matrix of the last linear map, the embedding where they are tied. Kept once read."""
        return self._head

    def logits(self, normed: Tensor, head: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of hidden states [B, T, D] after the last norm.

        head  [V, D], another matrix in place of the model's, for a trial

        The model's own forward computes them, with what it would get from its blocks put in, so that whatever a family
        does to its logits (a cap, a scale) is done.
        """
        with torch.no_grad():
            return self._logits(normed, head)

    def _logits(self, normed: Tensor, head: Tensor | None = None) -> Tensor:
        given = transformers.modeling_outputs.BaseModelOutputWithPast(last_hidden_state=normed)

        class Given(nn.Module):
            def forward(self, **_: Any) -> Any:
                return given

        model, prefix = self._model, self._model.base_model_prefix
        matrix = self.head() if head is None else head
        model.get_output_embeddings().weight = nn.Parameter(matrix, requires_grad=False)
        base = getattr(model, prefix)
        setattr(model, prefix, Given())
        try:
            result: Tensor = model(input_ids=None, use_cache=False).logits
        finally:
            setattr(model, prefix, base)
        return result

    def loss_gradient(
        self, hidden: Tensor, draw: Callable[[Tensor], Tensor], watch: Callable[[Tensor, Tensor], object]
    ) -> Tensor:
        """The gradient by hidden states [..., D] before the last norm of the summed cross entropy with drawn labels.

        draw   labels [n] int64 of logits [n, V]
        watch  given what the head reads [n, D], and the gradient by what it puts out [n, V]
        """
        given = hidden.to(device=self.device, dtype=self.dtype).detach().requires_grad_()
        head = self._model.get_output_embeddings()

        def seen(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            read = inputs[0].detach().flatten(0, -2)

            def received(gradient: Tensor) -> None:
                watch(read, gradient.flatten(0, -2))

            output.register_hook(received)  # type: ignore[no-untyped-call]

        with torch.enable_grad():
            handle = head.register_forward_hook(seen)
            try:
                logits = self._logits(self._finish(given.reshape(1, -1, given.shape[-1])))[0].float()
            finally:
                handle.remove()
            loss = nn.functional.cross_entropy(logits, draw(logits.detach()), reduction="sum")
            (result,) = torch.autograd.grad(loss, given)
        return result


def final_hidden(
    checkpoint: Checkpoint,
    graph: ModelGraph,
    tokens: Tensor,
    progress: Progress = QUIET,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Hidden states [N, T, D] after the last norm, for tokens [N, T] int64; block by block, so one block is in memory.

    float32 whatever `dtype` the blocks ran in.
    """
    forward = Forward(checkpoint, graph, dtype, device)
    parts = list(batches(*tokens.shape))
    hidden = torch.cat([forward.embed(tokens[part]).float().cpu() for part in parts])
    with progress.task("running the model", graph.block_count * tokens.numel()) as done:
        for index in range(graph.block_count):
            block = forward.load_block(index)
            for part in parts:
                hidden[part] = forward.run(block, hidden[part]).float().cpu()
                done(tokens[part].numel())
    for part in parts:
        hidden[part] = forward.finish(hidden[part]).float().cpu()
    return hidden
