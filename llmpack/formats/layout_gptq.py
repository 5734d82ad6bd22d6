"""The GPTQ layout: int codes of the matrices in the blocks, as auto-gptq, GPTQModel, transformers and vLLM load them.

What the words are: `llmpack.encodings.gptq_words`. Symmetric groups are written as version 1, which every loader knows;
groups with a zero of their own as version 2, since version 1 cannot say a zero of 0.

Rounding in activation order needs no permutation here. The scales of all groups are fixed before the first column is
rounded ("static groups"), so `quantize.gptq` takes columns in any order and each stays in its group: ``g_idx`` is
``column // group`` and ``desc_act`` is false, which loaders run fastest. Where columns with inputs alike in size are
to share a scale (encodings called ``_act``), ``g_idx`` says which do, and ``desc_act`` is true.

Everything outside the blocks stays in floats, and so does what the recipe leaves in floats inside them. Loaders are
told by name: transformers, optimum and vLLM by ``modules_in_block_to_quantize``, GPTQModel by ``dynamic``.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

import llmpack
from llmpack.encodings import encoding
from llmpack.encodings.encoding import GridEncoding
from llmpack.encodings.gptq_words import RUN, dequantize, pack_words, pack_zeros
from llmpack.encodings.names import INT_NAMES, int_options
from llmpack.encodings.tiles import SLAB, runs
from llmpack.errors import MissingExtra, StepFailed
from llmpack.formats.layout_plain import float_entry, float_pieces
from llmpack.formats.layouts import FLOATS, Entry, Layout
from llmpack.models.graph import ModelGraph, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llmpack.checkpoint.checkpoint import Checkpoint
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

QUANTIZE_CONFIG = "quantize_config.json"
FORMATS = {1: "gptq", 2: "gptq_v2"}
"""``checkpoint_format`` by version. Optimum alone looks for it as ``format``, and takes ``act_group_aware``, which is
about rounding, for true where it is not told."""

STRIP = 1 << 22
"""Codes that become words at once."""


@dataclass(frozen=True)
class Gptq(Layout):
    """Codes in int32 words with scales and zeros per group."""

    name: ClassVar[str] = "gptq"

    def problem(self, spec: TensorSpec) -> str | None:
        """Why a tensor cannot be written as the steps leave it, with the cure; None if it can."""
        if spec.encoding in FLOATS:
            return None
        if spec.encoding not in INT_NAMES:
            return f'it holds int groups and floats, not {spec.encoding}; set encoding = "int4_g128" or the like'
        if not spec.is_linear:
            option = "output" if spec.part == "output" else "embedding"
            return f'what lies outside the blocks stays in floats; set {option} = "f16" in the step that quantizes'
        if spec.shape[0] % RUN:
            return f"zeros of {RUN} rows share words, and it has {spec.shape[0]}; leave {spec.part} in f16 (exceptions)"
        return None

    def graph_problem(self, graph: ModelGraph) -> str | None:
        """Why the tensors do not go together, with the cure; None if they do."""
        kinds = list(dict.fromkeys(spec.encoding for spec in graph.tensors if spec.encoding in INT_NAMES))
        if not kinds:
            return 'no matrix has int groups; quantize with encoding = "int4_g128", or set layout = "plain"'
        if len(kinds) > 1:
            return f"all int groups are of one kind, not {', '.join(kinds)}; write one, and f16 for the exceptions"
        return None

    def require_loader(self) -> None:
        """GPTQModel runs it in transformers, and optimum puts it there."""
        for package in ("gptqmodel", "optimum"):
            if importlib.util.find_spec(package) is None:
                raise MissingExtra(package, "gptq")

    def stored_as(self, spec: TensorSpec) -> str:
        """The encoding of int groups, or the floats."""
        return spec.encoding if spec.encoding in INT_NAMES else self.floats

    def entries(self, spec: TensorSpec) -> tuple[Entry, ...]:
        """The four tensors of a matrix in int groups, or the tensor itself."""
        if spec.encoding not in INT_NAMES:
            return (float_entry(spec, self.floats),)
        bits = int_options(spec.encoding).bits
        (rows, columns), groups, base = spec.shape, _groups(spec), _module(spec)
        return (
            Entry(f"{base}.qweight", "I32", (columns * bits // 32, rows)),
            Entry(f"{base}.qzeros", "I32", (groups, rows * bits // 32)),
            Entry(f"{base}.scales", "F16", (groups, rows)),
            Entry(f"{base}.g_idx", "I32", (columns,)),
        )

    def pieces(self, checkpoint: Checkpoint, spec: TensorSpec) -> Iterator[tuple[str, np.ndarray]]:
        """The bytes of those. Raises StepFailed for a tensor whose codes are not those of the graph."""
        stored = checkpoint.tensors[spec.name].encoding
        if spec.encoding not in INT_NAMES:
            yield from float_pieces(checkpoint, spec, self.floats)
            return
        if stored != spec.encoding:
            raise StepFailed(f"{spec.name} is stored as {stored} and the bundle wants {spec.encoding}; quantize it")
        bits = int_options(spec.encoding).bits
        codes, scales, zeros, group_of = _upright(checkpoint.packed(spec.name), spec)
        base, columns = _module(spec), spec.shape[1]
        for strip in runs(columns // RUN, RUN * spec.shape[0], STRIP):
            words = pack_words(codes[strip.start * RUN : strip.stop * RUN], bits)
            yield f"{base}.qweight", _raw(words)
        yield f"{base}.qzeros", _raw(pack_zeros(zeros, bits, version_of(spec.encoding)))
        yield f"{base}.scales", _raw(np.ascontiguousarray(scales.T))
        yield f"{base}.g_idx", _raw(group_of.astype("<i4"))

    def decode(self, read: Callable[[str], Tensor], spec: TensorSpec) -> Tensor:
        """The numbers that a loader will compute with; float32."""
        if spec.encoding not in INT_NAMES:
            return read(spec.name).float()
        four = [read(f"{_module(spec)}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")]
        bits = int_options(spec.encoding).bits
        return dequantize(*four, bits=bits, version=version_of(spec.encoding))

    def quantization_config(self, graph: ModelGraph) -> dict[str, Any] | None:
        """What config.json and quantize_config.json say of it."""
        quantized = [spec for spec in graph.tensors if spec.encoding in INT_NAMES]
        if not quantized:
            return None
        bits, group, symmetric, act_order = int_options(quantized[0].encoding)
        version = FORMATS[version_of(quantized[0].encoding)]
        return {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group,
            "sym": symmetric,
            "desc_act": act_order,
            "static_groups": not act_order,
            "act_group_aware": False,
            "true_sequential": True,
            "lm_head": False,
            "checkpoint_format": version,
            "format": version,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"llmpack:{llmpack.__version__}"]},
            **_left_out(graph),
        }

    def files(self, graph: ModelGraph) -> Mapping[str, bytes]:
        """quantize_config.json, which auto-gptq and GPTQModel read."""
        text = json.dumps(self.quantization_config(graph), indent=2, sort_keys=True) + "\n"
        return {QUANTIZE_CONFIG: text.encode()}


def version_of(name: str) -> int:
    """Version of the words that hold an encoding of int groups: 1 where zeros are all in the middle, else 2."""
    return 1 if int_options(name).symmetric else 2


def _module(spec: TensorSpec) -> str:
    return spec.name.removesuffix(".weight")


def _groups(spec: TensorSpec) -> int:
    group = int_options(spec.encoding).group
    return 1 if group < 0 else spec.shape[1] // group


def _left_out(graph: ModelGraph) -> dict[str, Any]:
    """How loaders are told which matrices of the blocks stay in floats; nothing where none does."""
    inside = [spec for spec in graph.tensors if spec.is_linear]
    left = [_module(spec) for spec in inside if spec.encoding not in INT_NAMES]
    if not left:
        return {}
    named = [_module(spec) for spec in inside if spec.encoding in INT_NAMES]
    dots = {name: name.replace(".", r"\.") for name in left}
    return {"modules_in_block_to_quantize": [named], "dynamic": {f"-:^{dots[name]}$": {} for name in left}}


def _upright(packed: np.ndarray, spec: TensorSpec) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes uint8 [columns, rows]; scales float16 and zeros uint8, both [rows, groups]; the group of each column."""
    kind = encoding(spec.encoding)
    if not isinstance(kind, GridEncoding):
        raise AssertionError(f"{kind.name} has no grid")
    (rows, columns), groups = spec.shape, _groups(spec)
    codes = np.empty((columns, rows), dtype=np.uint8)
    scales, zeros = np.empty((rows, groups), dtype=np.float16), np.empty((rows, groups), dtype=np.uint8)
    group_of = np.empty(columns, dtype=np.int64)
    for run in runs(rows, columns, SLAB):
        some, grid = kind.unpack(packed[run], columns)
        codes[:, run] = some.numpy().T
        group_of[:] = grid.group_of.numpy()
        levels = grid.levels(torch.from_numpy(np.unique(group_of, return_index=True)[1]))
        scales[run] = levels.scale.numpy()
        zeros[run] = levels.zero if isinstance(levels.zero, int) else levels.zero.numpy()
    return codes, scales, zeros, group_of


def _raw(values: np.ndarray) -> np.ndarray:
    """The bytes, little-endian, in order."""
    return np.ascontiguousarray(values).view(np.uint8).reshape(-1)
