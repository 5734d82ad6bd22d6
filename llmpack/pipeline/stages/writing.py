"""Stage 5, write: tensors stream into the model file; codes are copied, nothing is rounded twice."""

from __future__ import annotations

from dataclasses import replace

from llmpack.digest import sha256_file
from llmpack.errors import StepFailed
from llmpack.formats.bundle import MODEL, begin_bundle
from llmpack.pipeline.state import Artifact, Build


def write(build: Build) -> Build:
    """Fill in `workspace` and `artifact`. Raises StepFailed if the file is not as large as the plan said."""
    workspace = begin_bundle(build.final)
    path = workspace / MODEL
    planned = build.plan
    planned.file_format.write(build.checkpoint, planned.graph, path, planned.facts, build.progress)
    nbytes = path.stat().st_size
    if nbytes != planned.nbytes:
        raise StepFailed(f"{path.name} has {nbytes} bytes, the plan said {planned.nbytes}: please report this")
    return replace(build, workspace=workspace, artifact=Artifact(path, nbytes, sha256_file(path)))
