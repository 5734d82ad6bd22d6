"""Stage 5, write: tensors stream into the model file or folder; codes are copied, nothing is rounded twice."""

from __future__ import annotations

from dataclasses import replace

from llmpack.digest import sha256_file
from llmpack.errors import StepFailed
from llmpack.formats.bundle import MODEL, begin_bundle
from llmpack.formats.gguf import GgufFormat
from llmpack.pipeline.state import Artifact, Build


def write(build: Build) -> Build:
    """Fill in `workspace` and `artifact`. Raises StepFailed if the model is not as large as the plan said."""
    workspace = begin_bundle(build.final)
    planned, form = build.plan, build.plan.file_format
    names: tuple[str, ...] = (MODEL,)
    if isinstance(form, GgufFormat):
        form.write(build.checkpoint, planned.graph, workspace / MODEL, planned.facts, build.progress)
        path = workspace / MODEL
    else:
        names = form.write(build.checkpoint, planned.graph, workspace, planned.facts, build.progress)
        path = workspace
    sizes = {name: (workspace / name).stat().st_size for name in names}
    artifact = Artifact(path, sizes, {name: sha256_file(workspace / name) for name in names})
    if artifact.nbytes != planned.nbytes:
        raise StepFailed(f"the model has {artifact.nbytes} bytes, the plan said {planned.nbytes}: please report this")
    return replace(build, workspace=workspace, artifact=artifact)
