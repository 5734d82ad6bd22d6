"""A model on disk: a folder with config.json, safetensors and tokenizer files, read on demand, never modified.

Opening reads headers only and checks everything that can be checked without the data. Tensors that a step left
packed (blocks of codes) are stored as U8 [rows, bytes per row] under their own name; one metadata key,
``llmpack``, holds their encoding and logical shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from llmpack.checkpoint import config_intake, folder_intake, journal, tokenizer_intake
from llmpack.checkpoint.mapped import MappedFile
from llmpack.checkpoint.packed_metadata import KEY, stored_tensors
from llmpack.checkpoint.safetensors_header import Header, read_header
from llmpack.checkpoint.tensors import Packed, StoredTensor, byte_shape, chunks, decode, digest_of, finite
from llmpack.digest import sha256_file, sha256_value
from llmpack.errors import EnvironmentProblem, InputRejected, Problem
from llmpack.progress import QUIET, Progress

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

__all__ = ["KEY", "Checkpoint", "Packed", "StoredTensor"]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A folder that passed the intake.

    config           of config.json, without keys that only steer loaders (`_name_or_path`, ...)
    tensors          by name, in order of name
    tokenizer_files  what travels with the model: tokenizer, chat template, generation config
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    tokenizer_files: tuple[Path, ...]
    _files: Mapping[Path, MappedFile] = field(repr=False)
    _digests: dict[str, str] = field(repr=False)

    @classmethod
    def open(cls, folder: Path, *, quantized: bool = False) -> Checkpoint:
        """Open a folder that anybody may have made; no weight is read.

        quantized  also one whose config says that its weights are codes of another program: they can be listed, and
                   mean nothing here

        Raises InputRejected with every problem, each with rule and file, and EnvironmentProblem if there is no folder.
        """
        return cls(*_inspect(folder, quantized), _digests={})

    @classmethod
    def reopen(cls, folder: Path) -> Checkpoint:
        """Open what a `CheckpointWriter` of llmpack finished; digests of tensors come from its journal.

        Only for folders that nobody else can write to: the journal is believed after sizes and headers are compared.
        """
        return cls(*_inspect(folder), _digests=journal.tensor_digests(folder))

    def packed(self, name: str) -> np.ndarray:
        """uint8 [rows, bytes per row], read-only, mapped from the file. Raises KeyError for an unknown name."""
        tensor = self.tensors[name]
        view = self._files[tensor.file].view(tensor.offset, tensor.nbytes)
        return view.reshape(byte_shape(tensor.encoding, tensor.shape))

    def stored(self, name: str) -> Packed:
        """The tensor as it is stored, to be written elsewhere without decoding it."""
        tensor = self.tensors[name]
        return Packed(tensor.encoding, tensor.shape, self.packed(name))

    def read(self, name: str) -> Tensor:
        """A copy in memory, in logical shape: the stored dtype, or float32 decoded from blocks of codes."""
        tensor = self.tensors[name]
        return decode(self.packed(name), tensor.encoding, tensor.shape)

    def release(self, names: Iterable[str] | None = None) -> None:
        """Drop the resident pages of these tensors (of all for None) from this process."""
        if names is None:
            for file in self._files.values():
                file.release()
            return
        for name in names:
            tensor = self.tensors[name]
            self._files[tensor.file].release(tensor.offset, tensor.nbytes)

    def prefetch(self, names: Iterable[str]) -> None:
        """Ask the system to read these tensors meanwhile; nobody holds the memory until they are used."""
        for name in names:
            tensor = self.tensors[name]
            self._files[tensor.file].prefetch(tensor.offset, tensor.nbytes)

    def check_finite(self, progress: Progress = QUIET) -> None:
        """Read every tensor once: digest it, and refuse infinities and NaN (rule ``non-finite``).

        Tensors of nothing but zeros are told to `progress`, since they are allowed and seldom meant.
        """
        problems = []
        with progress.task("checking weights", sum(t.nbytes for t in self.tensors.values())) as done:
            for name, tensor in self.tensors.items():
                packed = self.packed(name)
                zero = True
                for rows in chunks(packed):
                    if not finite(rows, tensor.encoding, tensor.shape[-1] if tensor.shape else 1):
                        text = f"tensor {name!r} has infinite or NaN values; the checkpoint is damaged"
                        problems.append(Problem(text, where=str(tensor.file), rule="non-finite"))
                        break
                    zero = zero and not rows.any()
                else:
                    if zero and tensor.nbytes:
                        progress.say(f"{tensor.file.name}: tensor {name!r} holds nothing but zeros")
                    self._digest_tensor(name)
                self.release([name])
                done(tensor.nbytes)
        if problems:
            raise InputRejected(problems)

    def _digest_tensor(self, name: str) -> str:
        if name not in self._digests:
            self._digests[name] = digest_of(self.packed(name))
        return self._digests[name]

    def hash_tensors(self, progress: Progress = QUIET) -> Mapping[str, str]:
        """Hex sha256 of the bytes of each tensor; those already known (journal, `check_finite`) cost nothing."""
        missing = [t for t in self.tensors.values() if t.name not in self._digests]
        with progress.task("hashing weights", sum(t.nbytes for t in missing)) as done:
            for tensor in missing:
                self._digest_tensor(tensor.name)
                self.release([tensor.name])
                done(tensor.nbytes)
        return MappingProxyType({name: self._digests[name] for name in self.tensors})

    @cached_property
    def digest(self) -> str:
        """Hex sha256 of the content: config, tokenizer files, every tensor. Where shards begin does not matter.

        Reads the weights unless their digests are known; call `hash_tensors(progress)` first to show how far it is.
        """
        hashes = self.hash_tensors()
        tensors = [[t.name, t.encoding, list(t.shape), hashes[t.name]] for t in self.tensors.values()]
        files = [[path.name, sha256_file(path)] for path in self.tokenizer_files]
        return sha256_value({"format": 1, "config": dict(self.config), "tensors": tensors, "files": files})


_Parts = tuple[Path, Mapping[str, Any], Mapping[str, StoredTensor], tuple[Path, ...], Mapping[Path, MappedFile]]


def _inspect(folder: Path, quantized: bool = False) -> _Parts:
    """Everything that `open` checks, with all problems in one refusal."""
    if not folder.is_dir():
        raise EnvironmentProblem(f"{folder}: there is no such folder")
    problems: list[Problem] = []
    config = _config(folder, quantized, problems)
    problems += folder_intake.code_problems(folder)
    headers = _headers(folder, problems)
    tensors: dict[str, StoredTensor] = {}
    for header in headers:
        found, wrong = stored_tensors(header)
        problems += wrong
        twice = sorted(tensors.keys() & found.keys())
        problems += [
            Problem(f"tensor {n!r} lies in {tensors[n].file.name} too", where=str(header.path), rule="index-mismatch")
            for n in twice
        ]
        tensors.update(found)
    files, wrong = tokenizer_intake.tokenizer_files(folder)
    problems += wrong
    problems += tokenizer_intake.tokenizer_problems(files, tokenizer_intake.vocabulary_rows(config))
    if problems:
        raise InputRejected(problems)
    mapped = {h.path: MappedFile(h.path, h.size, h.identity) for h in headers}
    ordered = MappingProxyType(dict(sorted(tensors.items())))
    return folder, MappingProxyType(config), ordered, files, mapped


def _config(folder: Path, quantized: bool, problems: list[Problem]) -> dict[str, Any]:
    path = folder / folder_intake.CONFIG
    if not path.exists() and not path.is_symlink():
        text = "there is no config.json; a checkpoint is a folder as transformers saves it"
        problems.append(Problem(text, where=str(folder), rule="config-json"))
        return {}
    problem = folder_intake.file_problem(folder, path)
    if problem:
        problems.append(problem)
        return {}
    try:
        config = config_intake.read_config(path)
    except InputRejected as refusal:
        problems += refusal.problems
        return {}
    refusal_of_codes = None if quantized else config_intake.quantized_config_problem(config, str(path))
    if refusal_of_codes:
        problems.append(refusal_of_codes)
    return config


def _headers(folder: Path, problems: list[Problem]) -> list[Header]:
    try:
        weights = folder_intake.weight_map(folder)
    except InputRejected as refusal:
        problems += refusal.problems
        return []
    headers, damaged = [], False
    for path in weights.files:
        try:
            headers.append(read_header(path))
        except InputRejected as refusal:
            problems += refusal.problems
            damaged = True
    if weights.index is not None and not damaged:
        stored = {name: header.path.name for header in headers for name in header.tensors}
        problems += folder_intake.placement_problems(folder, weights.index, stored)
    return headers
