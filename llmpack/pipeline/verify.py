"""`llmpack verify`: are the files of a bundle those that were published, and is the model file sound?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.errors import InputRejected, Problem, VerificationFailed
from llmpack.formats.bundle import MANIFEST, Bundle, model_digest
from llmpack.pipeline.manifest import Manifest
from llmpack.pipeline.model_folder import ModelFolder
from llmpack.progress import QUIET, Progress


def verify_bundle(folder: Path, progress: Progress = QUIET) -> dict[str, Any]:
    """Compare every digest, the manifest's own, and the head of the model file.

    Raises VerificationFailed with every difference.
    """
    bundle = Bundle.open(folder, progress=progress)
    manifest = Manifest.read(bundle.manifest, str(folder / MANIFEST))
    artifact = manifest.made["artifact"]
    problems = []
    names = artifact.get("files", [artifact["file"]])
    if model_digest({name: bundle.digests.get(name, "") for name in names}) != artifact["sha256"]:
        problems.append(Problem(f"{artifact['file']} is not the model that the manifest describes", where=str(folder)))
    try:
        if bundle.model.is_dir():
            ModelFolder.open(folder, artifact)
        else:
            GgufFile.open(bundle.model)
    except InputRejected as rejected:
        problems += rejected.problems
    if problems:
        raise VerificationFailed(problems)
    return {"bundle": str(folder), "files": dict(bundle.digests), "made_sha256": bundle.manifest["made_sha256"]}
