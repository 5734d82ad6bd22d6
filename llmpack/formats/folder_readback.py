"""Read a written model folder back: every file compared afresh with what was meant, then loaded by transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmpack.checkpoint.safetensors_header import read_header
from llmpack.digest import sha256_file
from llmpack.errors import InputRejected, Problem, RuntimeFailed, VerificationFailed
from llmpack.formats.readback import CONTEXT, ReadBack, compare_conversations, compare_texts
from llmpack.formats.reference_tokenizer import CheckpointTokenizer
from llmpack.formats.safetensors_folder import SafetensorsFormat
from llmpack.formats.shards import Shard
from llmpack.formats.written import WrittenTensors
from llmpack.models.graph import ModelGraph
from llmpack.progress import QUIET, Progress
from llmpack.runtime.settings import RuntimeSettings
from llmpack.runtime.transformers_runtime import TransformersRuntime

if TYPE_CHECKING:
    from llmpack.checkpoint.checkpoint import Checkpoint


def read_folder_back(
    folder: Path,
    checkpoint: Checkpoint,
    graph: ModelGraph,
    form: SafetensorsFormat,
    settings: RuntimeSettings,
    progress: Progress = QUIET,
) -> ReadBack:
    """Compare a folder with what it was written from.

    Raises VerificationFailed with every difference, and with what transformers says if it does not load the folder;
    RuntimeFailed if it hangs, dies or runs out of memory.
    """
    graph = form.encode_graph(graph)
    problems = compare_folder(folder, checkpoint, graph, form, progress)
    if problems:
        raise VerificationFailed(problems)
    context = min(CONTEXT, int(graph.config.get("max_position_embeddings", CONTEXT)))
    with TransformersRuntime() as runtime:
        try:
            runtime.open(folder, settings, context)
        except RuntimeFailed as failure:
            if failure.kind in ("hang", "oom", "killed"):
                raise
            raise VerificationFailed([Problem(str(failure), where=str(folder))]) from failure
        reference = CheckpointTokenizer(checkpoint)
        texts, text_problems = compare_texts(runtime, reference)
        rendered, render_problems, notes = compare_conversations(runtime, reference)
    problems = [Problem(p.message, p.path, str(folder)) for p in (*text_problems, *render_problems)]
    if problems:
        raise VerificationFailed(problems)
    nbytes = sum(form.sizes(graph, checkpoint).values())
    return ReadBack(len(graph.tensors), nbytes, texts, rendered, notes)


def compare_folder(
    folder: Path, checkpoint: Checkpoint, graph: ModelGraph, form: SafetensorsFormat, progress: Progress = QUIET
) -> list[Problem]:
    """Differences between a folder, parsed afresh, and what `SafetensorsFormat.write` was to put there."""
    messages = [
        f"{name} is missing" if not (folder / name).is_file() else f"{name} has not the {nbytes} bytes announced"
        for name, nbytes in form.sizes(graph, checkpoint).items()
        if not (folder / name).is_file() or (folder / name).stat().st_size != nbytes
    ]
    if not messages:
        for name, data in form.small_files(graph).items():
            if (folder / name).read_bytes() != data:
                messages.append(f"{name} is not what was meant")
        for path in checkpoint.tokenizer_files:
            if sha256_file(folder / path.name) != sha256_file(path):
                messages.append(f"{path.name} is not that of the checkpoint")
        for shard in form.shards(graph):
            messages += _head_differences(folder, shard)
    if not messages:
        messages += _data_differences(folder, checkpoint, graph, form, progress)
    return [Problem(message, where=str(folder)) for message in messages]


def _head_differences(folder: Path, shard: Shard) -> Iterator[str]:
    try:
        header = read_header(folder / shard.file)
    except InputRejected as rejected:
        yield from (str(problem) for problem in rejected.problems)
        return
    found = {name: (t.dtype, t.shape, t.offset) for name, t in header.tensors.items()}
    meant = {entry.name: (entry.dtype, entry.shape, shard.offsets[entry.name]) for entry in shard.entries}
    for name in sorted(found.keys() | meant.keys()):
        if found.get(name) != meant.get(name):
            yield f"{shard.file}: {name} is {found.get(name)}, {meant.get(name)} was meant"


def _data_differences(
    folder: Path, checkpoint: Checkpoint, graph: ModelGraph, form: SafetensorsFormat, progress: Progress
) -> Iterator[str]:
    written = WrittenTensors(folder, [shard.file for shard in form.shards(graph)])
    total = sum(entry.nbytes for shard in form.shards(graph) for entry in shard.entries)
    with progress.task("reading back", float(total)) as done:
        for spec in graph.tensors:
            at: dict[str, int] = {}
            wrong: dict[str, int] = {}
            for name, data in form.layout.pieces(checkpoint, spec):
                start = at.get(name, 0)
                found = written.packed(name)[start : start + data.nbytes]
                wrong[name] = wrong.get(name, 0) + int((found != data).sum())
                at[name] = start + data.nbytes
                done(data.nbytes)
            yield from (f"{name}: {count} bytes are not those of {spec.name}" for name, count in wrong.items() if count)
            checkpoint.release([spec.name])
            for name in at:
                written.release(name)
