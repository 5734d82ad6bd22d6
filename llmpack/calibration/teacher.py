"""A teacher's predictions on a corpus, written once: whoever learns from them never has the teacher in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmpack.algorithms.distillation import likeliest
from llmpack.checkpoint.atomic import disk_errors, replaced_when_whole, require_space
from llmpack.errors import NumericalError
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
    hidden [N, T, D] float16, states after the last norm; None where nobody asked for them
    """

    ids: np.ndarray
    log_p: np.ndarray
    hidden: np.ndarray | None = None

    @classmethod
    def read(cls, folder: Path, name: str, *, hidden: bool) -> Predictions:
        """What `predictions` wrote."""
        paths = _paths(folder, name, hidden=hidden)
        return cls(*(np.load(path, mmap_mode="r") for path in paths.values()))

    def batch(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities [B, T, k] of some sequences, by number."""
        chosen = sequences.numpy()
        return torch.from_numpy(self.ids[chosen]), torch.from_numpy(self.log_p[chosen])

    def states(self, sequences: Tensor) -> Tensor:
        """Hidden states [B, T, D] of some sequences, by number. Raises ValueError where there are none."""
        if self.hidden is None:
            raise ValueError("these predictions were written without hidden states")
        return torch.from_numpy(self.hidden[sequences.numpy()])


def _paths(folder: Path, name: str, *, hidden: bool) -> dict[str, Path]:
    kinds = ("ids", "log-p", "hidden") if hidden else ("ids", "log-p")
    return {kind: folder / f"teacher-{name}-{kind}.npy" for kind in kinds}


def predictions(
    teacher: Forward,
    tokens: Tensor,
    k: int,
    temperature: float,
    folder: Path,
    name: str,
    progress: Progress = QUIET,
    *,
    hidden: bool = False,
) -> Predictions:
    """The teacher's `k` likeliest tokens after every token of `tokens` [N, T].

    hidden  keep its hidden states after the last norm too: 2 bytes for each of their numbers

    Read from `folder` where a run before wrote them; 6 bytes for each kept token. Raises EnvironmentProblem on a full
    disk, NumericalError for hidden states beyond float16.
    """
    paths = _paths(folder, name, hidden=hidden)
    if not all(path.exists() for path in paths.values()):
        _write(teacher, tokens, k, temperature, paths, progress)
    return Predictions.read(folder, name, hidden=hidden)


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
            best, values = likeliest(teacher.logits(rows[part][None])[0], k, temperature)
            ids[part], log_p[part] = best.numpy(), values.numpy()
            done(len(rows[part]))
    found: dict[str, np.ndarray] = {"ids": ids, "log-p": log_p}
    if "hidden" in paths:
        found["hidden"] = rows.half().numpy()
        if not np.isfinite(found["hidden"]).all():
            raise NumericalError("the teacher's hidden states do not fit float16; set hidden = 0")
    folder = paths["ids"].parent
    need = sum(array.nbytes for array in found.values())
    require_space(folder, need)
    for kind, array in found.items():
        with disk_errors(folder, need), replaced_when_whole(paths[kind]) as temporary, temporary.open("wb") as file:
            np.save(file, array.reshape(*tokens.shape, -1))
