"""Narrower models from calibration text: which channels and heads stay, and what the matrices that read them become.

Inside a block, feed-forward channels and groups of heads are chosen block by block while the walk stands there:
matrices see the inputs that the narrower blocks before give them. Channels of the hidden states are the same in all
blocks, so they are chosen from all of them first (`hidden_channels`), and each block is then adjusted for what it no
longer reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmpack.algorithms.narrowing import choose, compensated, costs, energies, inverse_of
from llmpack.calibration.walk import Visit
from llmpack.models.graph import ModelGraph, TensorSpec
from llmpack.models.tables import Sizes

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

PRE_NORM = {"attention.in": "attn_norm.weight", "ffn.in": "ffn_norm.weight"}
"""By input: what GGUF calls the norm that it comes from, in families where one stands there."""
POST_NORM = {"attention.out": "post_attention_norm.weight", "ffn.out": "post_ffw_norm.weight"}
"""By input of the matrix whose output they take: norms of what a block adds to the hidden states."""


@dataclass(frozen=True)
class Narrowed:
    """One block: what stays of an input, and the matrix that reads it.

    stays  [kept] int64, units
    W      [rows, columns that stay] float64
    """

    stays: Tensor
    W: Tensor


def narrow(visit: Visit, inputs: str, unit: int, keep: int, damping: float, *, compensate: bool) -> Narrowed:
    """Choose `keep` units of the input of one matrix, and let the walk go on without the others.

    inputs  "ffn.out" or "attention.out"
    unit    neighbouring columns that stay or go together
    """
    (spec,) = (one for one in visit.specs if one.inputs == inputs)
    H, W = visit.hessians([inputs])[inputs].mean(), visit.weight(spec.name)
    if compensate:
        stays = choose(W, H, unit, keep, damping)
        columns = spread(stays, unit)
        V = compensated(W, H, columns, damping)
    else:
        stays = torch.topk(energies(W, H, unit), keep).indices.sort().values
        columns = spread(stays, unit)
        V = W[:, columns].double()
    silent = torch.zeros_like(W)
    silent[:, columns] = V.to(W.dtype)
    visit.replace(spec.name, silent)
    return Narrowed(stays, V)


def spread(units: Tensor, width: int) -> Tensor:
    """[units * width] int64: the columns of whole units."""
    return (units[:, None] * width + torch.arange(width)).reshape(-1)


def group_width(sizes: Sizes) -> int:
    """Columns that the heads of one key and value head take in what attention's last matrix reads."""
    return sizes.q_rows // sizes.kv_heads


class HiddenChannels:
    """What each channel of the hidden states is worth to the matrices that read it, summed over the model.

    Every input counts alike, whatever its size: costs are taken relative to the mean square of what is read.
    """

    def __init__(self, channels: int) -> None:
        self.worth = torch.zeros(channels, dtype=torch.float64)

    def add(self, weights: Iterable[Tensor], H: Tensor, damping: float, *, compensate: bool) -> None:
        """Add the matrices [rows, channels] that read one input with ``H = E[x x^T]``."""
        W = torch.cat(list(weights)).to(torch.float64)
        each = costs(W, inverse_of(H, damping), 1) if compensate else energies(W, H, 1)
        total = float((W @ H.double() * W).sum())
        if total > 0:
            self.worth += each.cpu() / total

    def best(self, keep: int) -> Tensor:
        """[keep] int64, ascending."""
        return torch.topk(self.worth, keep).indices.sort().values


def norm_of(specs: Iterable[TensorSpec], gguf: str) -> TensorSpec | None:
    """The norm of a block that GGUF knows by this name."""
    return next((spec for spec in specs if spec.gguf_name is not None and spec.gguf_name.endswith(f".{gguf}")), None)


def rescaled(weight: Tensor, offset: float, squares: Tensor, stays: Tensor) -> Tensor:
    """The weights [kept] of a norm over the channels `stays`, so that what it lets through keeps its size.

    weight   [channels] as it is; the norm multiplies by it plus `offset`
    squares  [channels] mean square of what the norm divides by its root mean square, in any unit
    """
    scale = (squares[stays].mean() / squares.mean().clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    return (weight[stays].double() + offset) * scale - offset


def normed_squares(H: Tensor, weight: Tensor, offset: float) -> Tensor:
    """[channels] float64: mean squares before the weights of a norm whose outputs have the moments H."""
    factor = weight.double() + offset
    return torch.where(factor == 0, 0.0, torch.diagonal(H).double() / factor.pow(2))


def readers(graph: ModelGraph, block: int) -> Mapping[str, tuple[TensorSpec, ...]]:
    """The matrices of a block that read hidden states, by input."""
    groups = graph.input_groups(block)
    return {name: specs for name, specs in groups.items() if specs[0].axes[-1] == "hidden"}
