"""Healing without training: the blocks that are left, changed to lead where the whole model's blocks led.

Two streams of hidden states run over the same text, the whole model's and that of the blocks that are left. At a gap,
and on request at every block behind one, the matrix that a block ends with takes up what it can predict of the
difference (`llmpack.algorithms.healing`). Then the block runs again, so that later ones see what was healed. Blocks
that were made narrower are led back in the same way, each of them.

Every token counts by its relative difference: the norm that reads hidden states divides by their size, and single
tokens whose size is a hundred times that of others would else be all that is fitted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from llmpack.algorithms.healing import gains, predicted_by
from llmpack.algorithms.hessian import CrossSum, HessianSum
from llmpack.calibration.ablation import apply, embedded
from llmpack.checkpoint.tensors import torch_dtype
from llmpack.models import family_of
from llmpack.models.forward import Block, Forward, batches
from llmpack.models.graph import TensorSpec
from llmpack.progress import QUIET, Progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

POST_NORM = "post_ffw_norm.weight"
"""What GGUF calls the norm of what a feed-forward layer adds, in families that have one."""


@dataclass
class _Sums:
    """What one block's last matrix sees, and what it should add, over all tokens."""

    own: HessianSum
    cross: CrossSum


def healed(
    forward: Forward,
    tokens: Tensor,
    kept: Sequence[int],
    *,
    damping: float,
    every: bool,
    progress: Progress = QUIET,
) -> dict[str, Tensor]:
    """New numbers for some tensors of the blocks `kept`, by name, in the dtype in which they are stored.

    forward  of the whole model
    every    change all blocks from the first gap on, not only those before one

    Memory: two streams of hidden states [N, T, D] float32 and one block. Raises NumericalError.
    """
    changed: dict[str, Tensor] = {}
    whole = embedded(forward, tokens)
    own = whole
    following = [*kept[1:], forward.graph.block_count]
    with progress.task("healing", forward.graph.block_count) as done:
        for dropped in range(kept[0]):
            whole = apply(forward, forward.load_block(dropped), whole)
            done(1)
        for index, after in zip(kept, following, strict=True):
            block = forward.load_block(index)
            same = own is whole
            whole = apply(forward, block, whole)
            for dropped in range(index + 1, after):
                whole = apply(forward, forward.load_block(dropped), whole)
                done(1)
            if after == index + 1 and (same or not every):
                own = whole if same else apply(forward, block, own)
            else:
                pairs = ((own[part], whole[part]) for part in batches(*own.shape[:2]))
                changed |= close(forward, block, pairs, damping)
                own = apply(forward, block, own)
            done(1)
    return changed


def healed_towards(
    forward: Forward,
    whole: Forward,
    tokens: Tensor,
    *,
    channels: Tensor | None = None,
    damping: float,
    progress: Progress = QUIET,
) -> dict[str, Tensor]:
    """New numbers for what every block of a narrower model ends with, by name, as `healed` does behind a gap.

    forward   of the narrower model
    whole     of the model that it was, with as many blocks
    channels  [D'] which of the hidden states it has; None for all

    Memory: two streams of hidden states [N, T, D] float32 and one block. Raises NumericalError.
    """
    changed: dict[str, Tensor] = {}
    own, wanted = embedded(forward, tokens), embedded(whole, tokens)
    with progress.task("healing", forward.graph.block_count) as done:
        for index in range(forward.graph.block_count):
            wanted = apply(whole, whole.load_block(index), wanted)
            block = forward.load_block(index)
            parts = batches(*own.shape[:2])
            pairs = ((own[part], wanted[part] if channels is None else wanted[part][..., channels]) for part in parts)
            changed |= close(forward, block, pairs, damping)
            own = apply(forward, block, own)
            done(1)
    return changed


def close(forward: Forward, block: Block, pairs: Iterable[tuple[Tensor, Tensor]], damping: float) -> dict[str, Tensor]:
    """Change what `block` ends with, so that it leads nearer to where it should; new numbers by name.

    pairs  hidden states [B, T, D] that it sees and those that it should give, batch by batch
    """
    specs = forward.graph.block(block.index)
    norm = next((spec for spec in specs if spec.gguf_name and spec.gguf_name.endswith(POST_NORM)), None)
    if norm is not None:
        return _close_norm(forward, block, norm, pairs, damping)
    down = next(spec for spec in specs if spec.part == "ffn.down")
    rows, columns = down.shape
    sums = _Sums(HessianSum(columns, forward.device), CrossSum(columns, forward.device, rows))
    module = block.module.get_submodule(forward.module_path(down).rpartition(".")[0])
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(partial(_note_input, seen))
    try:
        for own, whole in pairs:
            missing, weight = _missing(forward, block, own, whole)
            a = seen.pop() * weight
            sums.own.add(a)
            sums.cross.add(missing, a)
    finally:
        hook.remove()
    change = predicted_by(sums.own.mean(), sums.cross.mean(), damping)
    change /= family_of(forward.graph.config).residual_scale(forward.graph.config)
    return _put(forward, block, down, forward.checkpoint.read(down.name).double() + change.cpu())


def _close_norm(
    forward: Forward, block: Block, norm: TensorSpec, pairs: Iterable[tuple[Tensor, Tensor]], damping: float
) -> dict[str, Tensor]:
    tokens = 0
    module = block.module.get_submodule(forward.module_path(norm).rpartition(".")[0])
    power, cross = (torch.zeros(norm.shape, dtype=torch.float64) for _ in range(2))
    seen: list[Tensor] = []
    hook = module.register_forward_hook(partial(_note_output, seen))
    try:
        for own, whole in pairs:
            missing, weight = _missing(forward, block, own, whole)
            tokens += own.shape[0] * own.shape[1]
            o = (seen.pop() * weight).double().flatten(0, 1).cpu()
            power += (o**2).sum(0)
            cross += (o * missing.double().flatten(0, 1).cpu()).sum(0)
    finally:
        hook.remove()
    offset = family_of(forward.graph.config).norm_offset
    values = forward.checkpoint.read(norm.name).double()
    gain = gains(power / tokens, cross / tokens, damping)
    return _put(forward, block, norm, (values + offset) * (1 + gain) - offset)


def _note_input(seen: list[Tensor], _: nn.Module, given: tuple[Tensor, ...]) -> None:
    seen.append(given[0])


def _note_output(seen: list[Tensor], _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
    seen.append(output)


def _missing(forward: Forward, block: Block, own: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """What the block's output lacks [B, T, D], and the weight of each token [B, T, 1], which is in it already."""
    weight = relative_weight(whole).to(forward.device)
    return (whole.to(forward.device) - forward.run(block, own).float()) * weight, weight


def relative_weight(whole: Tensor) -> Tensor:
    """[B, T, 1]: by what a difference from hidden states [B, T, D] is multiplied to be relative to their size."""
    return whole.pow(2).mean(-1, keepdim=True).rsqrt().clamp_max(1e6)


def _put(forward: Forward, block: Block, spec: TensorSpec, values: Tensor) -> dict[str, Tensor]:
    stored = values.to(torch_dtype(spec.encoding))
    block.module.get_parameter(forward.module_path(spec)).copy_(stored)
    return {spec.name: stored}
