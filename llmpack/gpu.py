"""The GPU that torch finds by CUDA."""

from __future__ import annotations

from typing import Any

from llmpack.errors import EnvironmentProblem


def torch_with_gpu(setting: str) -> Any:
    """torch, imported for a setting that asks for a GPU. Raises EnvironmentProblem where it finds none."""
    import torch

    if not torch.cuda.is_available():
        raise EnvironmentProblem(
            f"torch {torch.__version__} finds no GPU by CUDA; leave out {setting}, or use a torch that does"
        )
    return torch
