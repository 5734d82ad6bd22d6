"""How far changed models are from the source on the same text, in nats: what steps choose and judge by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

from llmpack.algorithms.divergence import Wanted
from llmpack.models.forward import Forward

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

CHUNK = 256
"""Tokens whose logits are held at once."""

Name = TypeVar("Name")


def mean_kl(source: Forward, wanted: Tensor, changed: Forward, candidates: Mapping[Name, Tensor]) -> dict[Name, float]:
    """Mean KL divergence of the source's predictions to those of each candidate.

    source      gives logits for `wanted`, its final hidden states [N, T, D]
    changed     gives logits for each of `candidates`, final hidden states [N, T, D'] of models that share its head
    """
    sums = dict.fromkeys(candidates, 0.0)
    rows = wanted.reshape(-1, wanted.shape[-1])
    flat = {name: hidden.reshape(-1, hidden.shape[-1]) for name, hidden in candidates.items()}
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        target = Wanted.of(_logits(source, rows[part]))
        for name, hidden in flat.items():
            sums[name] += float(target.kl(_logits(changed, hidden[part])).sum())
    return {name: total / len(rows) for name, total in sums.items()}


def _logits(forward: Forward, rows: Tensor) -> Tensor:
    return forward.logits(rows[None])[0].float()
