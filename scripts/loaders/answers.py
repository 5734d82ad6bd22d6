"""What loaded models say to the probes; runs in the loader's environment, which has torch and numpy but no llmpack.

A loader script gives a function that loads a folder. Answers to each folder go to a file of its own: logits of the
probe, the tokens that greedy decoding adds to it, versions of the packages by name and, where the loader unpacks
weights, the sha256 of each unpacked matrix. A folder that does not load leaves the complaint instead.
"""

from __future__ import annotations

import hashlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

Unpacked = Iterator[tuple[str, torch.Tensor]]


def greedy(model: Any, tokens: list[int], count: int) -> tuple[np.ndarray, list[int], list[float]]:
    """Logits [T, V] float32 of the probe; `count` tokens after it, each the likeliest; the lead of each. No cache."""
    added: list[int] = []
    leads = []
    with torch.no_grad():
        first = last = model(input_ids=torch.tensor([tokens])).logits[0].float()
        while True:
            best = last[-1].topk(2)
            added.append(int(best.indices[0]))
            leads.append(float(best.values[0] - best.values[1]))
            if len(added) == count:
                return first.numpy(), added, leads
            last = model(input_ids=torch.tensor([[*tokens, *added]])).logits[0].float()


def digest(matrix: torch.Tensor) -> str:
    """Of a matrix [R, C]: its float32 numbers, bit for bit, but for the sign of zeros, which a product may lose."""
    return hashlib.sha256((matrix.float() + 0.0).contiguous().numpy().tobytes()).hexdigest()


def main(
    load: Callable[[str], Any], packages: tuple[str, ...], unpacked: Callable[[Any], Unpacked] | None = None
) -> None:
    """Load the folders that ``argv[1]`` (JSON) names, one after the other, and write answers to the folder ``argv[2]``.

    unpacked  gives the matrices of a model by name, [R, C], as the loader unpacks them
    """
    asked, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.manual_seed(0)
    versions = json.dumps({name: metadata.version(name) for name in packages})
    for place, (folder, tokens) in enumerate(zip(asked["folders"], asked["tokens"], strict=True)):
        try:
            model = load(folder).eval()
            logits, added, _ = greedy(model, tokens, asked["count"])
            with torch.no_grad():
                found = {} if unpacked is None else {name: digest(matrix) for name, matrix in unpacked(model)}
        except Exception as fault:  # noqa: BLE001 (whatever a loader complains of is the result)
            traceback.print_exc()
            (out / f"{place}.failure").write_text(f"{type(fault).__name__}: {fault}")
            continue
        answers = {"logits": logits, "tokens": np.array(added)}
        np.savez(out / f"{place}.npz", **answers, unpacked=np.array(json.dumps(found)), versions=np.array(versions))
