"""A model as transformers saves one, as it lies there: its files, its tensors, its outline. Headers only, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmpack.checkpoint.config_intake import quantization_method, read_config
from llmpack.checkpoint.safetensors_header import HeaderTensor, read_header
from llmpack.digest import sha256_file
from llmpack.errors import InputRejected, Problem
from llmpack.formats.bundle import CONFIG, MANIFEST, Bundle, model_digest, name_problem
from llmpack.models import family_of
from llmpack.models.graph import ModelGraph
from llmpack.target.outline import Outline
from llmpack.target.transformers_memory import loader_of

WEIGHTS = ".safetensors"
ADAPTER = "adapter_config.json"
"""What transformers takes a folder for an adapter by, whose base model it then loads from elsewhere."""


@dataclass(frozen=True)
class ModelFolder:
    """A folder that holds a model among other files, such as those of a bundle.

    files    names of the model's files
    config   of config.json
    tensors  by the names under which they lie there
    """

    path: Path
    files: tuple[str, ...]
    config: Mapping[str, Any]
    tensors: Mapping[str, HeaderTensor]

    @classmethod
    def open(cls, path: Path, artifact: Mapping[str, Any]) -> ModelFolder:
        """The folder of a bundle whose manifest describes the model. Raises InputRejected for damaged files."""
        files = tuple(map(str, artifact.get("files", ())))
        lost = [name for name in files if name_problem(name) or not (path / name).is_file()]
        if lost or CONFIG not in files:
            text = f"{', '.join(lost) or CONFIG} is no file of this folder, and the manifest should name it as one"
            raise InputRejected([Problem(text, where=str(path), rule="bundle")])
        tensors: dict[str, HeaderTensor] = {}
        for name in files:
            if name.endswith(WEIGHTS):
                tensors |= read_header(path / name).tensors
        return cls(path, files, read_config(path / CONFIG), tensors)

    @classmethod
    def opened(cls, path: Path) -> ModelFolder:
        """The folder of a bundle, whose manifest names its files. Raises as `open`, and VerificationFailed."""
        from llmpack.pipeline.manifest import Manifest

        manifest = Manifest.read(Bundle.open(path, contents=False).manifest, str(path / MANIFEST))
        return cls.open(path, manifest.made["artifact"])

    @classmethod
    def found(cls, path: Path) -> ModelFolder:
        """A folder that anybody may have made, its weights plain or quantized, of any architecture.

        Raises InputRejected with every problem.
        """
        from llmpack.checkpoint.checkpoint import Checkpoint
        from llmpack.checkpoint.folder_intake import INDEX

        if (path / ADAPTER).exists():
            text = "an adapter beside the weights, which transformers would load with them; merge it, or take it away"
            raise InputRejected([Problem(text, where=str(path / ADAPTER), rule="adapter")])
        opened = Checkpoint.open(path, quantized=True)
        weights = sorted({tensor.file.name for tensor in opened.tensors.values()})
        index = [INDEX] if (path / INDEX).is_file() else []
        files = (CONFIG, *weights, *index, *(file.name for file in opened.tokenizer_files))
        tensors: dict[str, HeaderTensor] = {}
        for name in weights:
            tensors |= read_header(path / name).tensors
        return cls(path, files, opened.config, tensors)

    @property
    def size(self) -> int:
        """Bytes of all files of the model."""
        return sum((self.path / name).stat().st_size for name in self.files)

    def digest(self) -> str:
        """What stands for the model: reads all its files."""
        return model_digest({name: sha256_file(self.path / name) for name in self.files})

    @cached_property
    def graph(self) -> ModelGraph:
        """The model, without what its encodings are. Raises InputRejected for an unknown family."""
        return family_of(self.config).graph(self.config)

    @property
    def outline(self) -> Outline:
        """What its memory follows from, if the family is known."""
        try:
            outline = Outline.of_graph(self.graph)
        except InputRejected:
            return Outline.of_config(self.config)
        return outline.in_transformers(loader_of(self.config, sum(tensor.nbytes for tensor in self.tensors.values())))

    def rows(self) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
        """Name, shape, encoding and bytes of every tensor of the model, whatever it is stored as."""
        method = quantization_method(self.config)
        whole = {spec.name for spec in self.graph.tensors}
        for spec in self.graph.tensors:
            stem = spec.name.removesuffix("weight")
            parts = {
                name: tensor
                for name, tensor in self.tensors.items()
                if name == spec.name or (name.startswith(stem) and spec.name.endswith("weight") and name not in whole)
            }
            plain = list(parts) == [spec.name] and parts[spec.name].shape == spec.shape
            encoding = parts[spec.name].dtype.lower() if plain else str(method)
            yield spec.name, spec.shape, encoding, sum(tensor.nbytes for tensor in parts.values())
