"""GPTQModel as the engine of `quantize.gptq`: it rounds, and its codes are taken over.

It runs in a process of its own on the whole model, so neither the promise about memory nor going on after the last
finished block holds while it does. The folder that it wrote is read matrix by matrix: codes, scales, zeros and groups
become packed rows like those of the native engine, number for number, and all that follows is the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open

from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.tensors import Packed
from llmpack.checkpoint.writing import CheckpointWriter
from llmpack.encodings import encoding
from llmpack.encodings.encoding import GridEncoding
from llmpack.encodings.gptq_words import unpack_words, unpack_zeros
from llmpack.encodings.grids import BlockGrid, ZeroGrid
from llmpack.encodings.grouped import IntGroups
from llmpack.encodings.names import INT_NAMES, int_options
from llmpack.encodings.ordered import OrderedGrid, OrderedIntGroups
from llmpack.errors import StepFailed
from llmpack.models.graph import ModelGraph, TensorSpec
from llmpack.process import Child
from llmpack.runtime.gptqmodel_worker import ENVIRONMENT
from llmpack.steps.blocks import Treated, packed_as, plain_encode, write_block, write_outside
from llmpack.steps.step import Workbench

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

SECONDS = 7 * 24 * 3600
"""It says nothing while it works; after so long it counts as hung."""


def quantize(
    checkpoint: Checkpoint, target: ModelGraph, bench: Workbench, *, damping: float, activation: bool
) -> Checkpoint:
    """Write the checkpoint that GPTQModel makes to ``bench.folder``. Raises StepFailed, and RuntimeFailed of the child.

    activation  whether columns are rounded in the order of their inputs
    """
    writer = CheckpointWriter(bench.folder, checkpoint)
    write_outside(writer, checkpoint, target, plain_encode, bench.progress)
    folder = bench.work / "gptqmodel"
    if not folder.is_dir():  # else a run that was killed had got beyond it
        _run(checkpoint, folder, config_of(target, damping, activation), bench)
    rounded = Folder(folder)
    for index in range(target.block_count):
        treated = {}
        for spec in target.block(index):
            if spec.encoding in INT_NAMES:
                treated[spec.name] = Treated(rounded.taken(spec))
            elif spec.is_linear:
                W = checkpoint.read(spec.name).to(torch.float32)
                treated[spec.name] = Treated(packed_as(spec, encoding(spec.encoding).encode(W)))
        write_block(writer, checkpoint, target, index, treated, {"engine": rounded.versions})
    return writer.finish()


def config_of(target: ModelGraph, damping: float, activation: bool) -> dict[str, Any]:
    """Options of its QuantizeConfig: what stays in floats is told by name, zeros are stored as they are."""
    linear = [spec for spec in target.tensors if spec.is_linear and spec.block is not None]
    bits, group, symmetric, act_order = int_options(next(s.encoding for s in linear if s.encoding in INT_NAMES))
    left = [spec.name.removesuffix(".weight").replace(".", r"\.") for spec in linear if spec.encoding not in INT_NAMES]
    return {
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": act_order,
        "act_group_aware": activation and not act_order and group > 0,
        "damp_percent": damping,
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
        "dynamic": {f"-:^{name}$": {} for name in left} or None,
    }


def _run(checkpoint: Checkpoint, folder: Path, config: Mapping[str, Any], bench: Workbench) -> None:
    if bench.corpus is None:
        raise StepFailed("quantize.gptq learns from calibration text, and there is none; add [calibration]")
    folder = folder.resolve()
    part, tokens = folder.with_suffix(".part"), folder.with_suffix(".npy")
    shutil.rmtree(part, ignore_errors=True)
    bench.work.mkdir(parents=True, exist_ok=True)
    np.save(tokens, bench.corpus.tokens.numpy())
    asked = {"source": str(checkpoint.folder.resolve()), "out": str(part), "tokens": str(tokens), "config": config}
    with (
        bench.progress.task("GPTQModel", 1) as done,
        Child("llmpack.runtime.gptqmodel_worker", title="GPTQModel", environment=ENVIRONMENT) as child,
    ):
        made = child.ask("quantize", {**asked, "threads": bench.threads}, SECONDS)
        done(1)
    (part / "versions.json").write_text(json.dumps(made["versions"]))
    part.rename(folder)
    tokens.unlink()


class Folder:
    """What GPTQModel wrote."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.versions: Mapping[str, str] = json.loads((folder / "versions.json").read_text())
        told = json.loads((folder / "config.json").read_text())["quantization_config"]
        self._version = 2 if told["checkpoint_format"] == "gptq_v2" else 1
        index = folder / "model.safetensors.index.json"
        self._places: Mapping[str, str] = json.loads(index.read_text())["weight_map"] if index.is_file() else {}

    def taken(self, spec: TensorSpec) -> Packed:
        """A matrix as packed rows of its encoding. Raises StepFailed where it is not what was asked for."""
        kind = encoding(spec.encoding)
        bits, group, symmetric, _ = int_options(spec.encoding)
        words = {part: self._read(spec, part) for part in ("qweight", "qzeros", "scales", "g_idx")}
        scales = words["scales"].to(torch.float16).T.contiguous()
        if not torch.equal(scales.float(), words["scales"].float().T):
            raise StepFailed(f"{spec.name}: GPTQModel's scales do not fit float16")
        codes = torch.from_numpy(unpack_words(words["qweight"].numpy(), bits).T.copy())
        zeros = torch.from_numpy(unpack_zeros(words["qzeros"].numpy(), bits, self._version))
        per = spec.shape[1] if group < 0 else group
        if codes.shape != spec.shape or scales.shape != (spec.shape[0], spec.shape[1] // per):
            raise StepFailed(f"{spec.name}: GPTQModel wrote {list(codes.shape)} in {scales.shape[1]} groups")
        if symmetric and not bool((zeros == 1 << (bits - 1)).all()):
            raise StepFailed(f"{spec.name}: GPTQModel's zeros are not in the middle; set an _asym encoding")
        return packed_as(spec, _packed(kind, codes, scales, zeros, words["g_idx"].long(), spec.name))

    def _read(self, spec: TensorSpec, part: str) -> Tensor:
        name = f"{spec.name.removesuffix('.weight')}.{part}"
        with safe_open(self._folder / self._places.get(name, "model.safetensors"), "pt") as file:
            if name not in file.keys():  # noqa: SIM118 (not a dict)
                raise StepFailed(f"GPTQModel wrote no {name}")
            tensor: Tensor = file.get_tensor(name)
            return tensor


def _packed(kind: Any, codes: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, name: str) -> np.ndarray:
    """[rows, row bytes] of codes [rows, columns], scales and zeros [rows, groups] and the group of each column."""
    base = kind.base if isinstance(kind, OrderedIntGroups) else kind
    if not isinstance(base, IntGroups) or not isinstance(kind, GridEncoding):
        raise AssertionError(f"{kind.name} are int groups")
    per = codes.shape[1] // scales.shape[1]
    plain = torch.arange(codes.shape[1]) // per
    grid: Any
    if base.is_symmetric:
        grid = BlockGrid(scales, None, base.steps, per)
    else:
        grid = ZeroGrid(scales, zeros.to(torch.uint8), base.steps, per)
    if isinstance(kind, OrderedIntGroups):
        order = torch.argsort(groups, stable=True)
        if not torch.equal(groups[order], plain):
            raise StepFailed(f"{name}: GPTQModel's groups are not full")
        return kind.pack(codes, OrderedGrid(grid, order))
    if not torch.equal(groups, plain):
        raise StepFailed(f"{name}: GPTQModel put columns out of order; set encoding = {kind.name}_act")
    return kind.pack(codes, grid)
