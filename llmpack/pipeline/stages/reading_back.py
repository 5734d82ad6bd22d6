"""Stage 6, read back: the file is parsed afresh, compared, and loaded by its runtime. A broken one does not live on."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from llmpack.errors import VerificationFailed
from llmpack.formats.folder_readback import read_folder_back
from llmpack.formats.readback import ReadBack
from llmpack.formats.readback import read_back as compare
from llmpack.formats.safetensors_folder import SafetensorsFormat
from llmpack.formats.written import Written
from llmpack.models.graph import ModelGraph
from llmpack.pipeline.corpora import Text
from llmpack.pipeline.evidence import faithfulness
from llmpack.pipeline.recipe import EvaluationSection
from llmpack.pipeline.state import Build
from llmpack.target.quality import fidelity_problems

if TYPE_CHECKING:
    from torch import Tensor

    from llmpack.checkpoint.checkpoint import Checkpoint

FIDELITY_TEXT = "python:pydoc_data.topics"
FIDELITY_TOKENS = 256


def read_back(build: Build) -> Build:
    """Fill in `checked` and the report of fidelity.

    Raises VerificationFailed with every difference, after deleting the file; RuntimeFailed.
    """
    artifact, form = build.artifact, build.plan.file_format
    try:
        checked = _compared(build)
        weights, graph, digest = _own_weights(build)
        found = faithfulness(build.subject, weights, graph, digest, lambda: _tokens(build), build.cache)
        problems = fidelity_problems(found)
        if problems:
            raise VerificationFailed(problems)
    except VerificationFailed:
        for name in artifact.sizes:
            ((artifact.path if isinstance(form, SafetensorsFormat) else artifact.path.parent) / name).unlink()
        raise
    return replace(build, checked=checked, reports={"fidelity": asdict(found)})


def _compared(build: Build) -> ReadBack:
    """The artifact, parsed afresh and loaded, against what it was written from."""
    path, planned, settings = build.artifact.path, build.plan, build.recipe.runtime
    form = planned.file_format
    if isinstance(form, SafetensorsFormat):
        return read_folder_back(path, build.checkpoint, planned.graph, form, settings, build.progress)
    return compare(path, build.checkpoint, planned.graph, form, planned.facts, settings, build.progress)


def _own_weights(build: Build) -> tuple[Checkpoint, ModelGraph, str]:
    """The weights that the artifact says it has, their graph and their digest: what its runtime must compute with.

    Those of a GGUF file are the checkpoint's, whose codes it has; those of a folder are decoded from what it holds.
    """
    planned, form = build.plan, build.plan.file_format
    if isinstance(form, SafetensorsFormat):
        digest = build.artifact.sha256
        return *Written.reading(build.artifact.path, build.checkpoint, planned.graph, form, digest), digest
    graph = planned.steps[-1].graph if planned.steps else build.origin.graph
    return build.checkpoint, graph, build.steps[-1].output if build.steps else build.source


def _tokens(build: Build) -> Tensor:
    """Tokens on which the file and its own weights must agree; which text it is matters little."""
    length = min(FIDELITY_TOKENS, int(build.origin.graph.config["max_position_embeddings"]))
    section = EvaluationSection(text=(FIDELITY_TEXT,), tokens=length, length=length)
    text = Text("fidelity", section, build.document, build.origin.checkpoint)
    return text.build(build.cache).tokens
