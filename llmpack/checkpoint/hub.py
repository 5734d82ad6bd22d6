"""Repositories of the Hugging Face hub: from the local cache if it has them whole, downloaded otherwise.

Only files of known names are fetched, never pickles and never code; the config is checked before the weights are
fetched. The layout of the cache (``refs``, ``snapshots``, ``blobs``) is documented in huggingface_hub's guide
"Manage huggingface_hub cache-system".
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from llmpack.checkpoint import folder_intake
from llmpack.checkpoint.atomic import disk_errors, write_atomic
from llmpack.checkpoint.config_intake import read_config
from llmpack.checkpoint.licence import CARD, LICENCE_FILE
from llmpack.checkpoint.strict_json import parse_json
from llmpack.errors import EnvironmentProblem, InputRejected, Problem

_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHTS = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TIMEOUT = 30.0


@dataclass(frozen=True)
class Snapshot:
    """The files of a repository at one commit (40 hex digits)."""

    folder: Path
    commit: str


def snapshot(
    repository: str, revision: str, *, offline: bool, cache: Path | None = None, endpoint: str | None = None
) -> Snapshot:
    """The repository at that commit, tag or branch. The cache is asked first; a branch then is what it was there.

    cache, endpoint  huggingface_hub's own settings unless given

    Raises EnvironmentProblem if something is missing and cannot be fetched, InputRejected if it must not be.
    """
    from huggingface_hub import constants

    store = (Path(constants.HF_HUB_CACHE) if cache is None else cache).expanduser()
    home = store / ("models--" + repository.replace("/", "--"))
    commit = _cached_commit(home, revision)
    missing = ["config.json", "weights", "tokenizer"]
    if commit is not None:
        folder = home / "snapshots" / commit
        missing = list(missing_files(folder))
        if not missing:
            return Snapshot(folder, commit)
    if offline or constants.HF_HUB_OFFLINE:
        switch = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the build is offline"
        at = f"commit {commit}" if commit else f"revision {revision}"
        raise EnvironmentProblem(
            f"hf:{repository}@{revision}: {', '.join(missing)} of {at} not in the cache {store}, and {switch}; "
            f"run once with the network, or: hf download {repository} --revision {revision}"
        )
    return _download(repository, revision, store, home, endpoint)


def _cached_commit(home: Path, revision: str) -> str | None:
    if _COMMIT.fullmatch(revision):
        return revision
    ref = home / "refs" / revision
    if not ref.is_file():
        return None
    commit = ref.read_text(encoding="ascii", errors="replace").strip()
    return commit if _COMMIT.fullmatch(commit) else None


def missing_files(folder: Path) -> Iterator[str]:
    """What a snapshot lacks to be a model: config, weights (each shard of the index), a tokenizer."""
    if not (folder / folder_intake.CONFIG).exists():
        yield folder_intake.CONFIG
    index = folder / folder_intake.INDEX
    if index.exists():
        yield from (name for name in _shards(index) if not (folder / name).exists())
    elif not (folder / folder_intake.SINGLE).exists():
        yield f"{folder_intake.SINGLE} or {folder_intake.INDEX}"
    if not any((folder / name).exists() for name in _TOKENIZERS):
        yield " or ".join(_TOKENIZERS)


def _shards(index: Path) -> list[str]:
    """Plain shard names of an index; anything else is left for the intake to refuse."""
    if index.stat().st_size > folder_intake.MAX_INDEX:
        return []
    try:
        table = parse_json(index.read_bytes())
    except ValueError:
        return []
    names = table.get("weight_map") if isinstance(table, dict) else None
    targets = set(map(str, names.values())) if isinstance(names, dict) else set()
    return sorted(name for name in targets if _WEIGHTS.fullmatch(name) and ".." not in name)


def is_wanted(name: str) -> bool:
    """True for the files of a repository that are fetched: known names at its top, never pickles, never code."""
    if name in folder_intake.TOKENIZER_FILES or name in (folder_intake.CONFIG, folder_intake.INDEX, CARD):
        return True
    if _WEIGHTS.fullmatch(name):
        return not folder_intake.DUPLICATE_WEIGHTS.fullmatch(name)
    return LICENCE_FILE.fullmatch(name) is not None and not name.endswith((".py", ".bin", ".pt", ".pkl"))


def _check_listing(where: str, names: list[str]) -> None:
    """Refuse by the list of files alone, before anything is fetched."""
    code = sorted(name for name in names if name.endswith(".py"))
    if code:
        text = f"the repository carries code ({', '.join(code[:3])}), which llmpack never runs"
        raise InputRejected([Problem(text, where=where, rule="remote-code")])
    if any(is_wanted(name) and name.endswith(".safetensors") for name in names):
        return
    pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5")))
    if pickles:
        text = f"only {', '.join(pickles[:3])}: such files can run code when loaded; look for a safetensors version"
        raise InputRejected([Problem(text, where=where, rule="pickle-weights")])
    ggufs = [name for name in names if name.endswith(".gguf")]
    cure = f"; download {ggufs[0]} and name it as gguf:FILE" if ggufs else ""
    raise InputRejected([Problem(f"the repository has no safetensors weights{cure}", where=where, rule="not-weights")])


def _download(repository: str, revision: str, store: Path, home: Path, endpoint: str | None) -> Snapshot:
    """List, judge, fetch the small files, judge the config, fetch the weights."""
    from huggingface_hub import HfApi, snapshot_download

    # the base class of whatever HTTP library this version of huggingface_hub uses
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    where = f"hf:{repository}@{revision}"
    try:
        info = HfApi(endpoint=endpoint).model_info(repository, revision=revision, timeout=_TIMEOUT)
        commit = info.sha or ""
        if not _COMMIT.fullmatch(commit):
            raise EnvironmentProblem(f"{where}: the hub gave no commit for this revision")
        names = [entry.rfilename for entry in info.siblings or ()]
        _check_listing(where, names)
        wanted = [name for name in names if is_wanted(name)]
        small = [name for name in wanted if not name.endswith(".safetensors")]
        store.mkdir(parents=True, exist_ok=True)
        if not sys.stderr.isatty():
            disable_progress_bars()
        with disk_errors(store, 0, "what was fetched so far is kept in the cache"):
            for patterns in (small, wanted):
                folder = Path(
                    snapshot_download(
                        repository, revision=commit, cache_dir=store, allow_patterns=patterns, endpoint=endpoint
                    )
                )
                if (folder / folder_intake.CONFIG).exists():
                    read_config(folder / folder_intake.CONFIG)
    except (HTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        _explain(where, error)
    missing = list(missing_files(folder))
    if missing:
        raise InputRejected(
            [Problem(f"the repository has no {', no '.join(missing)}", where=where, rule="not-weights")]
        )
    if revision != commit:
        ref = home / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(ref, commit.encode())
    return Snapshot(folder, commit)


def _explain(where: str, error: Exception) -> NoReturn:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        text = "the repository is gated; accept its terms on its page, then run `hf auth login` or set HF_TOKEN"
    elif isinstance(error, RepositoryNotFoundError):
        text = "there is no such repository, or it is private (then run `hf auth login` or set HF_TOKEN)"
    elif isinstance(error, RevisionNotFoundError):
        text = "the repository has no such commit, tag or branch"
    else:
        text = f"the hub cannot be reached ({type(error).__name__}); check the network, or use a local folder"
    raise EnvironmentProblem(f"{where}: {text}") from error
