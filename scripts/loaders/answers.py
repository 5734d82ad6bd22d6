"""What a loaded model says to the probes; runs in the loader's environment, which has torch and numpy but no llmpack.

A loader script gives a function that loads a folder; its answers go to an .npz file: logits of the probe, the tokens
that greedy decoding adds to it, and versions of the packages by name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np
import torch


def greedy(model: Any, tokens: list[int], count: int) -> tuple[np.ndarray, list[int]]:
    """Logits [T, V] float32 of the probe, and `count` tokens after it, each the likeliest; no cache."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        first = model(input_ids=ids).logits[0].float()
        added = [int(first[-1].argmax())]
        while len(added) < count:
            ids = torch.tensor([[*tokens, *added]])
            added.append(int(model(input_ids=ids).logits[0, -1].float().argmax()))
    return first.numpy(), added


def main(load: Callable[[str], Any], packages: tuple[str, ...]) -> None:
    """Load ``argv[1]``, answer the probes in ``argv[2]`` (JSON), write ``argv[3]``."""
    folder, probes, out = sys.argv[1:4]
    with open(probes, encoding="utf-8") as file:  # noqa: PTH123 (as few imports as a loader's environment allows)
        asked = json.load(file)
    model = load(folder)
    logits, tokens = greedy(model.eval(), asked["tokens"], asked["count"])
    versions = json.dumps({name: metadata.version(name) for name in packages})
    np.savez(out, logits=logits, tokens=np.array(tokens), versions=np.array(versions))
