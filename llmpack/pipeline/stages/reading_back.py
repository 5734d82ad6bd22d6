"""Stage 6, read back: the file is parsed afresh, compared, and loaded by its runtime. A broken one does not live on."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from llmpack.errors import VerificationFailed
from llmpack.formats.readback import read_back as compare
from llmpack.pipeline.corpora import Text
from llmpack.pipeline.evidence import faithfulness
from llmpack.pipeline.recipe import EvaluationSection
from llmpack.pipeline.state import Build
from llmpack.target.quality import fidelity_problems

if TYPE_CHECKING:
    from torch import Tensor

FIDELITY_TEXT = "python:pydoc_data.topics"
FIDELITY_TOKENS = 256


def read_back(build: Build) -> Build:
    """Fill in `checked` and the report of fidelity.

    Raises VerificationFailed with every difference, after deleting the file; RuntimeFailed.
    """
    artifact, planned = build.artifact, build.plan
    try:
        checked = compare(
            artifact.path,
            build.checkpoint,
            planned.graph,
            planned.file_format,
            planned.facts,
            build.recipe.runtime,
            build.progress,
        )
        graph = planned.steps[-1].graph if planned.steps else build.origin.graph
        digest = build.steps[-1].output if build.steps else build.source
        found = faithfulness(build.subject, build.checkpoint, graph, digest, lambda: _tokens(build), build.cache)
        problems = fidelity_problems(found)
        if problems:
            raise VerificationFailed(problems)
    except VerificationFailed:
        artifact.path.unlink()
        raise
    return replace(build, checked=checked, reports={"fidelity": asdict(found)})


def _tokens(build: Build) -> Tensor:
    """Tokens on which the file and its own weights must agree; which text it is matters little."""
    length = min(FIDELITY_TOKENS, int(build.origin.graph.config["max_position_embeddings"]))
    section = EvaluationSection(text=(FIDELITY_TEXT,), tokens=length, length=length)
    text = Text("fidelity", section, build.document, build.origin.checkpoint)
    return text.build(build.cache).tokens
