"""Text that a model writes itself, to learn from: drawn token by token from its own predictions.

Each sequence begins with the first tokens of one of calibration text and goes on as the model would. Batches are
durable one by one, and each has a seed of its own, so a run that was killed goes on and ends with the same text.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmpack.calibration.student import whole_model
from llmpack.checkpoint.atomic import write_atomic
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.models.graph import ModelGraph
from llmpack.progress import QUIET, Progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

PROMPT = 8
"""Tokens of calibration text that a sequence begins with."""
BATCH = 16
"""Sequences that are written side by side."""


def self_written(
    checkpoint: Checkpoint,
    graph: ModelGraph,
    tokens: Tensor,
    seed: int,
    folder: Path,
    progress: Progress = QUIET,
) -> Tensor:
    """As many sequences [N, T] int64 as `tokens` [N, T] has, begun like those and gone on by the model.

    The whole model is in memory, float32.
    """
    starts = range(0, len(tokens), BATCH)
    paths = [folder / f"self-{start:06d}.npy" for start in starts]
    if not all(path.exists() for path in paths):
        model = whole_model(checkpoint, graph)
        with progress.task("writing text", tokens.numel()) as done:
            for start, path in zip(starts, paths, strict=True):
                if not path.exists():
                    _write(path, _continued(model, tokens[start : start + BATCH], seed + start))
                done(tokens[start : start + BATCH].numel())
    return torch.cat([torch.from_numpy(np.load(path)) for path in paths])


def _continued(model: torch.nn.Module, tokens: Tensor, seed: int) -> Tensor:
    """[B, T] int64: the beginnings of `tokens`, and what the model draws after them."""
    written = tokens[:, : min(PROMPT, tokens.shape[1])]
    generator = torch.Generator().manual_seed(seed)
    cache, fresh = None, written
    with torch.no_grad():
        while written.shape[1] < tokens.shape[1]:
            answer = model(input_ids=fresh, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = answer.past_key_values
            p = torch.softmax(answer.logits[:, -1].float(), -1)
            fresh = torch.multinomial(p, 1, generator=generator)
            written = torch.cat([written, fresh], 1)
    return written


def _write(path: Path, tokens: Tensor) -> None:
    content = io.BytesIO()
    np.save(content, tokens.numpy())
    write_atomic(path, content.getvalue())
