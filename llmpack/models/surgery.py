"""Surgery: the same model with fewer blocks, or narrower, as a plain checkpoint of the same family.

`resized` gives the graph that is left when so many blocks and channels stay: config and shapes follow, and whatever
the family or its runtime cannot be like is refused. It needs no data and no torch. `sliced` cuts one tensor to
the blocks and channels that stay. All blocks stay equal in shape, so that transformers and llama.cpp load the result.

Heads go in groups: a key and value head with all the query heads that share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from llmpack.errors import InputRejected, Problem
from llmpack.models import family_of
from llmpack.models.family import Family
from llmpack.models.graph import ModelGraph, TensorSpec
from llmpack.models.tables import Sizes

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

Index = np.ndarray
"""Positions that stay along one axis: int64, ascending."""


@dataclass(frozen=True)
class Kept:
    """What stays of a model.

    blocks  indexes in the model as it was, ascending
    ffn     by those indexes: feed-forward channels that stay; all where a block is not named
    groups  by those indexes: key and value heads that stay, with their query heads
    hidden  channels of the hidden states that stay, the same in every block; None for all
    """

    blocks: tuple[int, ...]
    ffn: Mapping[int, Index] = field(default_factory=dict)
    groups: Mapping[int, Index] = field(default_factory=dict)
    hidden: Index | None = None


def resized(
    graph: ModelGraph,
    *,
    blocks: Sequence[int] | None = None,
    ffn: int | None = None,
    groups: int | None = None,
    hidden: int | None = None,
) -> ModelGraph:
    """The graph that is left; each tensor is stored as it was.

    blocks  indexes of those that stay, ascending; None for all
    ffn     feed-forward channels that stay
    groups  key and value heads that stay, each with its query heads
    hidden  channels of the hidden states that stay

    Raises InputRejected where no config of the family says it or llama.cpp would run it as something else: a broken
    pattern of windows, heads that do not add up to the hidden size where they must.
    """
    family = family_of(graph.config)
    sizes = family.sizes(graph.config)
    stay = tuple(range(sizes.blocks)) if blocks is None else tuple(blocks)
    if not stay or list(stay) != sorted(set(stay)) or stay[0] < 0 or stay[-1] >= sizes.blocks:
        raise ValueError(f"blocks {stay} are no ascending part of 0-{sizes.blocks - 1}")
    dropped = set(range(sizes.blocks)) - set(stay)
    if family.breaks_pattern(graph.config, dropped):
        raise InputRejected([_pattern_problem(family, graph.config, dropped)])
    config = _config(family, graph.config, sizes, stay, ffn=ffn, groups=groups, hidden=hidden)
    encodings = {name: graph[old].encoding for name, old in _names(family, graph, stay)}
    return family.graph(config, encodings)


def _pattern_problem(family: Family, config: Mapping[str, Any], dropped: set[int]) -> Problem:
    period = family.period(config)
    said = ", ".join(map(str, sorted(dropped)))
    text = (
        f"without blocks {said} the kinds of attention would no longer repeat every {period} blocks, as {family.name} "
        f"and its runtimes have it; drop runs of {period} blocks"
    )
    return Problem(text, rule="unsupported-config")


def _config(
    family: Family,
    config: Mapping[str, Any],
    sizes: Sizes,
    blocks: tuple[int, ...],
    *,
    ffn: int | None,
    groups: int | None,
    hidden: int | None,
) -> dict[str, Any]:
    changed = dict(config)
    if len(blocks) < sizes.blocks:
        changed["num_hidden_layers"] = len(blocks)
        changed |= {key: [config[key][i] for i in blocks] for key in family.per_block if config.get(key) is not None}
    if ffn is not None:
        changed["intermediate_size"] = ffn
    if hidden is not None:
        changed["hidden_size"] = hidden
    if groups is not None:
        changed |= {"num_key_value_heads": groups, "num_attention_heads": groups * (sizes.heads // sizes.kv_heads)}
    heads, width = changed["num_attention_heads"], changed["hidden_size"]
    if config.get("head_dim") is not None or heads * sizes.head_dim != width:
        changed["head_dim"] = sizes.head_dim  # heads stay as wide as they are, whatever the other sizes imply
    return changed


def _names(family: Family, graph: ModelGraph, blocks: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Each tensor's name in the model that is left, and its name in the model as it was."""
    for spec in graph.outside:
        yield spec.name, spec.name
    for new, old in enumerate(blocks):
        before, after = f"{family.block_path}.{old}.", f"{family.block_path}.{new}."
        for spec in graph.block(old):
            yield after + spec.name.removeprefix(before), spec.name


def origins(graph: ModelGraph, blocks: Sequence[int]) -> dict[str, TensorSpec]:
    """By name in the model that is left: the tensor of `graph` that each comes from."""
    return {new: graph[old] for new, old in _names(family_of(graph.config), graph, blocks)}


def positions(axis: str, sizes: Sizes, kept: Kept, block: int | None) -> Index | None:
    """What stays along an axis of a tensor of `block`; None for all of it.

    sizes  of the model as it was
    """
    if axis == "hidden":
        return kept.hidden
    if block is None:
        return None
    ffn, groups = kept.ffn.get(block), kept.groups.get(block)
    if axis in ("ffn", "gate_up_rows") and ffn is not None:
        return ffn if axis == "ffn" else np.concatenate([ffn, ffn + sizes.ffn])
    if axis in ("q_rows", "kv_rows", "qkv_rows") and groups is not None:
        q = _spread(groups, sizes.q_rows // sizes.kv_heads)
        kv = _spread(groups, sizes.head_dim)
        if axis == "qkv_rows":
            return np.concatenate([q, kv + sizes.q_rows, kv + sizes.q_rows + sizes.kv_rows])
        return q if axis == "q_rows" else kv
    return None


def _spread(units: Index, width: int) -> Index:
    """Positions of whole units of so many neighbours."""
    spread: Index = (units[:, None] * width + np.arange(width)).reshape(-1)
    return spread


def sliced(values: Tensor, spec: TensorSpec, sizes: Sizes, kept: Kept) -> Tensor:
    """What stays of a tensor, in its own dtype.

    spec   of the tensor in the model as it was
    sizes  of that model
    """
    for at, axis in enumerate(spec.axes):
        chosen = positions(axis, sizes, kept, spec.block)
        if chosen is not None:
            values = values.index_select(at, torch.from_numpy(chosen))
    return values.contiguous()
