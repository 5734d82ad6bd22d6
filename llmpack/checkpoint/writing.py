"""Write a checkpoint shard by shard so that a crash at any instant loses at most the shard in the making."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpack.checkpoint import folder_intake
from llmpack.checkpoint.atomic import (
    copy_atomic,
    disk_errors,
    fsync_folder,
    is_temporary,
    replaced_when_whole,
    require_space,
    write_atomic,
)
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.journal import FinishedShard, Journal, header_digest
from llmpack.checkpoint.safetensors_writer import nbytes_of, write_safetensors
from llmpack.checkpoint.tensors import Packed, as_packed
from llmpack.digest import sha256_file, sha256_value
from llmpack.errors import StepFailed

if TYPE_CHECKING:
    from torch import Tensor

_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class CheckpointWriter:
    """Builds a checkpoint in `folder`, which may hold the finished shards of a run that was killed.

    base    where tokenizer files come from, and the config unless `config` gives another
    A shard is finished when its file is durable and a line of the journal, durable too, names it.
    Raises StepFailed if the folder holds anything else, EnvironmentProblem if the disk is full.
    """

    def __init__(self, folder: Path, base: Checkpoint, config: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self._base = base
        self._config = dict(base.config if config is None else config)
        files = [[path.name, sha256_file(path)] for path in base.tokenizer_files]
        self._journal = Journal(folder, sha256_value({"config": self._config, "files": files}))
        folder.mkdir(parents=True, exist_ok=True)
        self._shards = self._resume()

    def _resume(self) -> dict[str, FinishedShard]:
        names = [path.name for path in self.folder.iterdir() if not is_temporary(path.name)]
        shards = self._journal.read()
        if shards is None:
            if names:
                raise StepFailed(
                    f"{self.folder} holds {', '.join(sorted(names)[:3])} and no journal of this run; "
                    "delete the folder or choose another"
                )
            self._journal.begin()
            shards = {}
        counted = {shard.file for shard in shards.values()}
        for path in self.folder.iterdir():
            if is_temporary(path.name) or (path.suffix == ".safetensors" and path.name not in counted):
                path.unlink()
        return shards

    def finished(self, shard: str) -> Mapping[str, Any] | None:
        """The note of a durable shard, or None if it must be written."""
        return self._shards[shard].note if shard in self._shards else None

    def write(self, shard: str, tensors: Mapping[str, Tensor | Packed], note: Mapping[str, Any] | None = None) -> None:
        """Write one shard ("block-0003", "outside") and make it durable.

        tensors  by name; no name may lie in another shard
        note     JSON values that `finished` gives back after a crash

        Raises ValueError for a shard or tensor that was written before, EnvironmentProblem on a full disk.
        """
        if not _SHARD.fullmatch(shard) or shard in self._shards:
            raise ValueError(f"shard {shard!r} is written already, or is no name for a file")
        taken = {name for done in self._shards.values() for name in done.tensors} & tensors.keys()
        if taken:
            raise ValueError(f"shard {shard!r}: {sorted(taken)[0]!r} lies in another shard already")
        packed = {name: t if isinstance(t, Packed) else as_packed(t) for name, t in tensors.items()}
        path = self.folder / f"{shard}.safetensors"
        kept = f"{len(self._shards)} finished shards are kept in {self.folder}"
        require_space(self.folder, nbytes_of(packed), kept)
        with disk_errors(self.folder, nbytes_of(packed), kept):
            with replaced_when_whole(path) as temporary:
                digests = write_safetensors(temporary, packed)
            done = FinishedShard(shard, path.name, path.stat().st_size, header_digest(path), digests, dict(note or {}))
            self._journal.add(done)
        self._shards[shard] = done

    def finish(self) -> Checkpoint:
        """Write config, tokenizer files and, last, the index; open and return the result.

        Raises ValueError if no shard was written, InputRejected if the result does not pass the intake.
        """
        if not self._shards:
            raise ValueError("a checkpoint without a shard")
        for path in self._base.tokenizer_files:
            copy_atomic(path, self.folder / path.name)
        config = json.dumps(self._config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        write_atomic(self.folder / folder_intake.CONFIG, config.encode())
        placed = {name: done.file for done in self._shards.values() for name in done.tensors}
        index = {"metadata": {}, "weight_map": dict(sorted(placed.items()))}
        write_atomic(self.folder / folder_intake.INDEX, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
        fsync_folder(self.folder.parent)
        return Checkpoint.reopen(self.folder)
