"""A whole model that learns: which of its numbers do, and how they come back as tensors of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.models import family_of
from llmpack.models.forward import skeleton
from llmpack.models.graph import ModelGraph

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")
    nn = LazyModule("torch.nn")

Trainable = Literal["full", "lora", "norms"]


def whole_model(checkpoint: Checkpoint, graph: ModelGraph) -> Any:
    """transformers' model with every tensor of a checkpoint, float32, in memory; nothing of it learns."""
    family = family_of(graph.config)
    model = skeleton(graph.config)
    state = {family.module_name(spec.name): checkpoint.read(spec.name).to(torch.float32) for spec in graph.tensors}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    if unexpected or any(model.get_parameter(name).is_meta for name in missing):
        raise ValueError(f"not the tensors of this model: {[*missing, *unexpected][:3]}")
    return model.requires_grad_(False)


class Student:
    """A checkpoint as one module in memory, float32.

    trainable  full: every number; norms: weights of norms and biases; lora: for every linear map of a block the
               product of two thin matrices, added to it (Hu et al. 2021, arXiv:2106.09685)
    rank       of those products
    """

    def __init__(
        self, checkpoint: Checkpoint, graph: ModelGraph, trainable: Trainable, rank: int, generator: torch.Generator
    ) -> None:
        family = family_of(graph.config)
        self._block_path = family.block_path
        self._paths = {spec.name: family.module_name(spec.name) for spec in graph.tensors}
        self.model = whole_model(checkpoint, graph)
        self.learning: dict[str, nn.Parameter] = {}
        self._thin: dict[str, tuple[str, str]] = {}
        for spec in graph.tensors:
            if trainable == "lora" and spec.is_linear:
                self._add_thin(spec.name, rank, generator)
            elif trainable == "full" or (trainable == "norms" and spec.part in ("norm", "bias")):
                self.learning[spec.name] = self.model.get_parameter(self._paths[spec.name]).requires_grad_(True)

    def save_memory(self) -> None:
        """Let blocks compute their inner states again for their gradients, in place of keeping them."""
        for block in self.model.get_submodule(self._block_path).children():
            block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)

    def _add_thin(self, name: str, rank: int, generator: torch.Generator) -> None:
        path = self._paths[name].removesuffix(".weight")
        linear = self.model.get_submodule(path)
        rows, columns = linear.weight.shape
        down = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
        pair = nn.Parameter(down), nn.Parameter(torch.zeros(rows, rank))
        linear.register_parameter("thin_in", pair[0])
        linear.register_parameter("thin_out", pair[1])
        linear.register_forward_hook(_thin_output)
        names = f"{name}.in", f"{name}.out"
        self._thin[name] = names
        self.learning |= dict(zip(names, pair, strict=True))

    def tensors(self, learned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What learned numbers make of the tensors of the checkpoint, float32, by name; the others are as they were."""
        changed = {name: values for name, values in learned.items() if name in self._paths}
        for name, (thin_in, thin_out) in self._thin.items():
            W = self.model.get_parameter(self._paths[name]).detach()
            changed[name] = W + learned[thin_out] @ learned[thin_in]
        return changed


def _thin_output(linear: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + (given[0] @ linear.get_parameter("thin_in").T) @ linear.get_parameter("thin_out").T
