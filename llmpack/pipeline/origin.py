"""The model that a build starts from: found, validated, and as a checkpoint folder whatever form it came in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.checkpoint.source import Located, SourceRef, locate, require_plain
from llmpack.checkpoint.tensors import is_plain
from llmpack.encodings import ENCODINGS
from llmpack.errors import RecipeError
from llmpack.formats.facts import Facts
from llmpack.models import open_model
from llmpack.models.graph import ModelGraph
from llmpack.pipeline.cache import Cache
from llmpack.pipeline.keys import file_facts, import_facts
from llmpack.pipeline.model_folder import ModelFolder
from llmpack.pipeline.recipe import Recipe
from llmpack.pipeline.toml_positions import TomlDocument

DIGEST = "digest"
SOURCE = "source"
DEFAULT_DTYPE = "f32"


@dataclass(frozen=True)
class Origin:
    """A source, opened.

    located      where it lies and what its reference stood for
    checkpoint   the folder that steps read; for a GGUF file the one that it was decoded into
    graph        its tensors, as they are stored
    facts        what it says about itself, licence and origin among it
    dequantized  how many tensors of which block encoding were decoded; empty for a plain source
    """

    located: Located
    checkpoint: Checkpoint
    graph: ModelGraph
    facts: Facts
    dequantized: Mapping[str, int]

    def known_digest(self, cache: Cache) -> str | None:
        """The digest, if it was computed before and no file has changed since."""
        entry = cache.find(DIGEST, self._files())
        return None if entry is None else str(entry.result["digest"])

    def digest(self, cache: Cache) -> str:
        """Hex sha256 of the content. Reads every weight once, refusing infinities and NaN (InputRejected)."""
        with cache.claim(DIGEST, self._files(), "the digest of the source") as slot:
            if slot.entry is not None:
                return str(slot.entry.result["digest"])
            self.checkpoint.check_finite(cache.progress)
            return str(slot.finish({"digest": self.checkpoint.digest}).result["digest"])

    def _files(self) -> dict[str, Any]:
        weights = {tensor.file for tensor in self.checkpoint.tensors.values()}
        others = [self.checkpoint.folder / "config.json", *self.checkpoint.tokenizer_files]
        return {"name": "source digest", "files": [file_facts(path) for path in (*sorted(weights), *others)]}


def open_origin(recipe: Recipe, document: TomlDocument, cache: Cache, *, offline: bool = False) -> Origin:
    """Find, validate and open the source of a recipe; a GGUF file is decoded once and kept in the cache.

    Raises RecipeError, EnvironmentProblem or InputRejected.
    """
    try:
        ref = SourceRef.parse(recipe.source.model)
    except ValueError as error:
        raise RecipeError([document.problem(("source", "model"), str(error))]) from error
    located = locate(ref, offline=offline, root=Path(document.file).parent)
    if located.kind == "folder" and recipe.source.dtype is not None:
        message = "only a GGUF source is decoded; a folder keeps the float type in which it is stored"
        raise RecipeError([document.problem(("source", "dtype"), message)])
    if located.kind == "folder":
        checkpoint = Checkpoint.open(located.path)
        require_plain(located, recipe.source.dequantize, checkpoint)
        graph = open_model(checkpoint)
        name = located.ref.repository or located.path.resolve().name
        return Origin(located, checkpoint, graph, Facts.of_folder(located.path, name, graph.parameters), {})
    require_plain(located, recipe.source.dequantize)
    gguf = GgufFile.open(located.path)
    checkpoint = _imported(gguf, recipe.source.dtype or DEFAULT_DTYPE, cache)
    packed = {name: count for name, count in gguf.encodings.items() if not is_plain(name)}
    return Origin(located, checkpoint, open_model(checkpoint), Facts.of_gguf(gguf.metadata, located.path.stem), packed)


def _imported(gguf: GgufFile, dtype: str, cache: Cache) -> Checkpoint:
    from llmpack.models.from_gguf import import_gguf

    known = [name for name in gguf.encodings if name in ENCODINGS]  # the import refuses the others by name
    facts = import_facts(file_digest(gguf, cache), dtype, known)
    with cache.claim(SOURCE, facts, f"the source {gguf.path.name}") as slot:
        if slot.entry is not None:
            return Checkpoint.reopen(slot.content)
        checkpoint = import_gguf(gguf, slot.content, dtype, cache.progress)
        slot.finish({"digest": checkpoint.digest})
        return checkpoint


def file_digest(gguf: GgufFile, cache: Cache) -> str:
    """Hex sha256 of a GGUF file; remembered while the file does not change."""
    facts = {"name": "file digest", "files": [file_facts(gguf.path)]}
    return _remembered(facts, gguf.path, cache, lambda: gguf.digest(cache.progress))


def folder_digest(folder: ModelFolder, cache: Cache) -> str:
    """What stands for the model in a folder; remembered while none of its files changes."""
    facts = {"name": "folder digest", "files": [file_facts(folder.path / name) for name in folder.files]}
    return _remembered(facts, folder.path, cache, folder.digest)


def _remembered(facts: Mapping[str, Any], path: Path, cache: Cache, digest: Callable[[], str]) -> str:
    with cache.claim(DIGEST, facts, f"the digest of {path.name}") as slot:
        if slot.entry is not None:
            return str(slot.entry.result["digest"])
        return str(slot.finish({"digest": digest()}).result["digest"])
