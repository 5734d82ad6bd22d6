"""A teacher's predictions on a corpus, written once: whoever learns from them never has the teacher in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmpack.algorithms.distillation import likeliest
from llmpack.checkpoint.atomic import disk_errors, replaced_when_whole, require_space
from llmpack.models.forward import Forward, final_hidden
from llmpack.progress import QUIET, Progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

CHUNK = 256
"""Tokens whose logits are held at once."""


@dataclass(frozen=True)
class Predictions:
    """The likeliest tokens at every position, mapped from two files.

    ids    [N, T, k] int32
    log_p  [N, T, k] float16
    """

    ids: np.ndarray
    log_p: np.ndarray

    def batch(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities [B, T, k] of some sequences, by number."""
        chosen = sequences.numpy()
        return torch.from_numpy(self.ids[chosen]), torch.from_numpy(self.log_p[chosen])


def predictions(
    teacher: Forward, tokens: Tensor, k: int, temperature: float, folder: Path, name: str, progress: Progress = QUIET
) -> Predictions:
    """The teacher's `k` likeliest tokens after every token of `tokens` [N, T].

    Read from `folder` where a run before wrote them; 6 bytes for each kept token. Raises EnvironmentProblem on a full
    disk.
    """
    paths = {kind: folder / f"teacher-{name}-{kind}.npy" for kind in ("ids", "log-p")}
    if not all(path.exists() for path in paths.values()):
        _write(teacher, tokens, k, temperature, paths, progress)
    ids, log_p = (np.load(paths[kind], mmap_mode="r") for kind in ("ids", "log-p"))
    return Predictions(ids, log_p)


def _write(
    teacher: Forward, tokens: Tensor, k: int, temperature: float, paths: dict[str, Path], progress: Progress
) -> None:
    hidden = final_hidden(teacher.checkpoint, teacher.graph, tokens, progress)
    rows = hidden.reshape(-1, hidden.shape[-1])
    k = min(k, teacher.head().shape[0])
    ids, log_p = np.empty((len(rows), k), np.int32), np.empty((len(rows), k), np.float16)
    with progress.task("writing the teacher's predictions", len(rows)) as done:
        for start in range(0, len(rows), CHUNK):
            part = slice(start, start + CHUNK)
            found = likeliest(teacher.logits(rows[part][None])[0], k, temperature)
            ids[part], log_p[part] = found[0].numpy(), found[1].numpy()
            done(len(rows[part]))
    folder = paths["ids"].parent
    need = ids.nbytes + log_p.nbytes
    require_space(folder, need)
    for kind, values in (("ids", ids), ("log-p", log_p)):
        with disk_errors(folder, need), replaced_when_whole(paths[kind]) as temporary, temporary.open("wb") as file:
            np.save(file, values.reshape(*tokens.shape, k))
