"""Read a written GGUF file back: parsed afresh, compared with the checkpoint, loaded by its runtime.

A file that was written without an error may still say something else than was meant: a tensor under a
wrong name, a tokenizer that splits differently, a template that renders differently. Every difference
is listed; a bundle with one is not published.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.errors import InputRejected, Problem, RuntimeFailed, VerificationFailed
from llmpack.formats.facts import Facts
from llmpack.formats.gguf import GgufFormat, file_rows, rounded_minima
from llmpack.formats.gguf_container import Container, Value, ValueType
from llmpack.formats.probes import CONVERSATIONS, TEXTS, special_texts
from llmpack.formats.reference_tokenizer import CheckpointTokenizer, ReferenceTokenizer, TemplateRefusedError
from llmpack.models.graph import ModelGraph
from llmpack.progress import QUIET, Progress
from llmpack.runtime.llama import LlamaRuntime
from llmpack.runtime.runtime import Runtime
from llmpack.runtime.settings import RuntimeSettings

if TYPE_CHECKING:
    from llmpack.checkpoint.checkpoint import Checkpoint

CONTEXT = 256  # enough to see that the runtime takes the model
SILENCE_SECONDS = 120.0
MOST_SPECIAL = 24  # special tokens that are probed; some vocabularies reserve hundreds


@dataclass(frozen=True)
class ReadBack:
    """What was compared and found equal.

    texts          tokenizations compared
    conversations  renderings compared
    notes          what a user should know although nothing is wrong
    """

    tensors: int
    nbytes: int
    texts: int
    conversations: int
    notes: tuple[str, ...] = ()


def read_back(
    path: Path,
    checkpoint: Checkpoint,
    graph: ModelGraph,
    file_format: GgufFormat,
    facts: Facts,
    settings: RuntimeSettings,
    progress: Progress = QUIET,
) -> ReadBack:
    """Compare a file with what it was written from.

    Raises VerificationFailed with every difference, and with what the runtime says if it does not load
    the file; RuntimeFailed if the runtime hangs, dies or runs out of memory.
    """
    container = file_format.container(graph, checkpoint, facts)
    problems = compare_file(path, checkpoint, file_format.encode_graph(graph), container, progress)
    if problems:
        raise VerificationFailed(problems)
    with LlamaRuntime(silence=SILENCE_SECONDS) as runtime:
        try:
            runtime.open(path, settings, CONTEXT)
        except RuntimeFailed as failure:
            if failure.kind in ("hang", "oom", "killed"):
                raise
            raise VerificationFailed([Problem(f"llama.cpp does not load it: {failure}", where=str(path))]) from failure
        reference = ReferenceTokenizer(checkpoint, dict(container.metadata))
        texts, text_problems = compare_texts(runtime, reference)
        rendered, render_problems, notes = compare_conversations(runtime, reference)
    problems = [Problem(p.message, p.path, str(path)) for p in (*text_problems, *render_problems)]
    if problems:
        raise VerificationFailed(problems)
    count, share = rounded_minima(checkpoint, file_format.encode_graph(graph))
    if count:
        changed = f"{count} matrices of int groups were written as blocks with their minima rounded to float16"
        notes = (*notes, f"{changed}: a relative change of {share:.2g}")
    return ReadBack(len(container.tensors), container.nbytes, texts, rendered, notes)


def compare_file(
    path: Path, checkpoint: Checkpoint, graph: ModelGraph, container: Container, progress: Progress = QUIET
) -> list[Problem]:
    """Differences between a file, parsed afresh, and a checkpoint.

    graph  with the encodings of the file
    """
    where = str(path)
    try:
        file = GgufFile.open(path)
    except InputRejected as rejected:
        return list(rejected.problems)
    messages = list(_key_differences(file, container.metadata))
    if path.stat().st_size != container.nbytes:
        messages.append(f"the file has {path.stat().st_size} bytes, {container.nbytes} were announced")
    expected = {entry.name: (entry.shape, entry.ggml_type) for entry in container.tensors}
    found = {tensor.name: (tensor.shape, tensor.ggml_type) for tensor in file.tensors.values()}
    if list(expected) != list(found):
        lost, more = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        messages.append(f"tensors are missing ({lost}), too many ({more}), or in another order")
    for name in expected.keys() & found.keys():
        if expected[name] != found[name]:
            messages.append(f"{name}: shape and type are {found[name]}, {expected[name]} was meant")
    if messages:
        return [Problem(message, where=where) for message in messages]
    return [Problem(message, where=where) for message in _row_differences(file, checkpoint, graph, progress)]


def _key_differences(file: GgufFile, keys: Mapping[str, Value]) -> Iterator[str]:
    if list(file.metadata) != list(keys):
        lost, more = sorted(keys.keys() - file.metadata.keys()), sorted(file.metadata.keys() - keys.keys())
        yield f"keys are missing ({lost}), too many ({more}), or in another order"
    for key in keys.keys() & file.metadata.keys():
        value = keys[key]
        kinds = (int(value.type),) if value.element is None else (int(value.type), int(value.element))
        if tuple(file.types[key]) != kinds:
            yield f"{key} has the type {file.types[key]}, {kinds} was meant"
        elif not _same(file.metadata[key], value):
            yield f"{key} is {str(file.metadata[key])[:80]}, {str(value.data)[:80]} was meant"


def _same(found: Any, value: Value) -> bool:
    if ValueType.FLOAT32 in (value.type, value.element):
        return np.array_equal(np.asarray(found, np.float32), np.asarray(value.data, np.float32))
    if value.type is ValueType.ARRAY:
        return len(found) == len(value.data) and all(a == b for a, b in zip(found, value.data, strict=True))
    return bool(found == value.data)


def _row_differences(file: GgufFile, checkpoint: Checkpoint, graph: ModelGraph, progress: Progress) -> Iterator[str]:
    with progress.task("reading back", float(sum(spec.nbytes for spec in graph.tensors))) as done:
        for spec in graph.tensors:
            name = str(spec.gguf_name)
            packed = file.packed(name).reshape(spec.shape[0], -1)
            row = wrong = 0
            for rows in file_rows(checkpoint, spec):
                wrong += int((packed[row : row + len(rows)] != rows).any(axis=1).sum())
                row += len(rows)
            if wrong:
                yield f"{name}: {wrong} of {row} rows are not those of {spec.name}"
            file.release([name])
            checkpoint.release([spec.name])
            done(spec.nbytes)


def compare_texts(runtime: Runtime, reference: CheckpointTokenizer) -> tuple[int, list[Problem]]:
    """How many tokenizations were compared, and which differ; plain texts, then texts with special tokens in them."""
    texts = [*TEXTS, *special_texts(list(reference.special)[:MOST_SPECIAL])]
    problems, compared = [], 0
    for add_special in (False, True):
        for parse_special in (False, True):
            found = runtime.tokenize_all(texts, add_special=add_special, parse_special=parse_special)
            for text, ids in zip(texts, found, strict=True):
                expected = reference.encode(text, add_special=add_special, parse_special=parse_special)
                compared += 1
                if ids != expected:
                    how = f"add_special={add_special}, parse_special={parse_special}"
                    message = (
                        f"{text!r} is {ids} to {runtime.title} and {expected} to the checkpoint's tokenizer ({how})"
                    )
                    problems.append(Problem(message, path="tokenizer"))
    return compared, problems


def compare_conversations(
    runtime: Runtime, reference: CheckpointTokenizer
) -> tuple[int, list[Problem], tuple[str, ...]]:
    """How many renderings were compared, which differ, and what is worth a note.

    The runtime renders first, in its child process: a template that never ends ends there.
    """
    if not reference.has_template:
        return 0, [], ("the model has no chat template",)
    problems: list[Problem] = []
    refused, other_ids = [], 0
    for messages in CONVERSATIONS:
        shown, rendered = _rendering(runtime, messages)
        try:
            expected: str | None = reference.render(messages)
        except TemplateRefusedError as refusal:
            expected = None
            shown = shown or f"transformers refuses it ({refusal})"
        roles = ", ".join(message["role"] for message in messages)
        if rendered != expected:
            saw = f"{rendered!r} to {runtime.title} and {expected!r} to the checkpoint's own tokenizer"
            message = f"a conversation ({roles}) is {saw}. {shown}"
            problems.append(Problem(message, path="chat_template"))
        elif rendered is None:
            refused.append(roles)
            if messages is CONVERSATIONS[0]:
                problems.append(Problem(f"the chat template does not take one question: {shown}", path="chat_template"))
        elif reference.by_stretches:
            ids = runtime.tokenize(rendered, add_special=False, parse_special=True)
            other_ids += ids != reference.transformers_ids(rendered, add_special=False, parse_special=True)
    notes = [f"the chat template refuses a conversation of {roles}" for roles in refused]
    if other_ids:
        notes.append(
            f"{other_ids} of {len(CONVERSATIONS)} rendered conversations have other token ids in transformers, which "
            "sets spaces after special tokens differently; llama.cpp follows SentencePiece"
        )
    return len(CONVERSATIONS) - len(refused), problems, tuple(notes)


def _rendering(runtime: Runtime, messages: Sequence[Mapping[str, str]]) -> tuple[str, str | None]:
    try:
        return "", runtime.render(messages)
    except RuntimeFailed as failure:
        if failure.kind != "refused":
            raise
        return f"{runtime.title} refuses it ({failure})", None
