"""One step tried on a small model: what the tests of all steps that prune and train begin with."""

from __future__ import annotations

import json

import torch

from llmpack.calibration.corpus import Corpus
from llmpack.models import open_model
from llmpack.progress import QUIET
from llmpack.steps import STEPS
from llmpack.steps.step import Workbench


class Listener:
    """Progress that remembers what was said."""

    task = staticmethod(QUIET.task)

    def __init__(self):
        self.said = []

    def say(self, message):
        self.said.append(message)


def made(use, **options):
    """A step as a recipe would have it."""
    return STEPS.load(use).model_validate_json(json.dumps({"use": use, **options}))


def random_corpus(seed, count, length):
    return Corpus.of(torch.randint(0, 512, (count, length), generator=torch.Generator().manual_seed(seed)))


def bench(folder, source, corpus, progress=QUIET):
    return Workbench(folder / "content", folder / "work", source, corpus, 0, 1, progress)


def run(one, checkpoint, folder, corpus, progress=QUIET, source=None):
    """What a step makes, which is what its preview says."""
    graph = open_model(checkpoint)
    result = one.run(checkpoint, graph, bench(folder, source or checkpoint, corpus, progress))
    assert open_model(result).tensors == one.preview(graph).tensors
    assert dict(result.config) == dict(one.preview(graph).config)
    return result


def note_of(result):
    """What a step noted beside the tensors outside the blocks."""
    for line in (result.folder / "llmpack-journal.jsonl").read_text().splitlines():
        entry = json.loads(line.partition(" ")[2])
        if entry.get("shard") == "outside":
            return entry["note"]
    raise AssertionError("no shard `outside`")


def distill(**options):
    """`distill` that takes moments."""
    return made("distill", **{"learning_rate": 3e-3, "batch": 2, "check": 4, "top": 16, **options})
