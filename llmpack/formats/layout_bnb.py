"""The 4-bit layouts of bitsandbytes: codes of NF4 or FP4 in blocks of 64 numbers, as transformers saves and loads them.

Every linear map of every block is rounded by bitsandbytes itself, on the CPU, a slab of blocks at a time; blocks do not
see each other, so the bytes are those of rounding the whole matrix at once. Embedding, head, norms and biases stay
floats. Beside ``name`` (the codes, two in a byte, the first in the upper half) lie

    name.absmax                            largest magnitude of each block: float32, or 8-bit codes (double_quant)
    name.nested_absmax, .nested_quant_map  scale of each 256 of those codes, and what the codes stand for
    name.quant_map                         what the 16 codes stand for
    name.quant_state.bitsandbytes__nf4     JSON as bytes: sizes, types, and the mean that was taken off the magnitudes

NF4: Dettmers et al., QLoRA, https://arxiv.org/abs/2305.14314. The mean is a number of unknown length in text; it is
filled up with spaces to a fixed one, so that the size of a file is known before there is any data.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from llmpack.checkpoint.tensors import decode
from llmpack.errors import MissingExtra, NumericalError, Problem
from llmpack.formats.layout_plain import float_entry, float_pieces
from llmpack.formats.layouts import TORCH_NAMES, Entry, Layout
from llmpack.models import family_of
from llmpack.models.graph import ModelGraph, TensorSpec
from llmpack.models.selection import Selection
from llmpack.registry import suggestion

if TYPE_CHECKING:
    import bitsandbytes.functional as bnb
    import torch
    from torch import Tensor

    from llmpack.checkpoint.checkpoint import Checkpoint
else:
    from llmpack.lazy import LazyModule

    bnb = LazyModule("bitsandbytes.functional")
    torch = LazyModule("torch")

BLOCK, NESTED_BLOCK = 64, 256
LONGEST_NUMBER = 24
"""Letters of a float64 in JSON at most."""
SLAB = 1 << 20
"""Numbers rounded at once, about: 20 MB of working memory."""
SLAB_DECODED = 1 << 20
"""Numbers decoded at once: a whole number of blocks, and of bytes."""


@dataclass(frozen=True)
class _Bnb(Layout):
    """Linear maps in 4 bits.

    double_quant  store the scales in 8 bits too
    keep          parts that stay floats, as in exceptions of quantizing steps
    """

    kind: ClassVar[str]

    double_quant: bool = True
    keep: tuple[str, ...] = ()

    def require(self) -> None:
        """bitsandbytes rounds."""
        if importlib.util.find_spec("bitsandbytes") is None:
            raise MissingExtra("bitsandbytes", "nf4")

    @cached_property
    def _kept(self) -> tuple[Selection, ...]:
        return tuple(Selection.parse(text) for text in self.keep)

    def option_problems(self, graph: ModelGraph) -> list[Problem]:
        """Selections of `keep` that are none, or that mean nothing in this model."""
        parts = list(dict.fromkeys(spec.part for spec in graph.tensors if spec.is_linear))
        problems = []
        for text in self.keep:
            try:
                selection = Selection.parse(text)
            except ValueError as fault:
                problems.append(Problem(str(fault), "keep"))
                continue
            beyond = [last for _, last in selection.blocks if last >= graph.block_count]
            if selection.part not in parts:
                problems.append(Problem(f"no part `{selection.part}`{suggestion(selection.part, parts)}", "keep"))
            elif beyond:
                text = f"block {max(beyond)} does not exist; the model has blocks 0-{graph.block_count - 1}"
                problems.append(Problem(text, "keep"))
        return problems

    def _rounds(self, spec: TensorSpec) -> bool:
        return spec.is_linear and not any(spec in selection for selection in self._kept)

    def stored_as(self, spec: TensorSpec) -> str:
        """The 4-bit type, or the floats."""
        return self.kind if self._rounds(spec) else self.floats

    def entries(self, spec: TensorSpec) -> tuple[Entry, ...]:
        """Codes and what they need, or the tensor as floats."""
        if not self._rounds(spec):
            return (float_entry(spec, self.floats),)
        name, blocks = spec.name, -(-spec.parameters // BLOCK)
        state = self._state(spec, 0.0)
        found = [
            Entry(name, "U8", (-(-spec.parameters // 2), 1)),
            Entry(f"{name}.absmax", "U8" if self.double_quant else "F32", (blocks,)),
            Entry(f"{name}.quant_map", "F32", (16,)),
            Entry(f"{name}.quant_state.bitsandbytes__{self.kind}", "U8", (len(state),)),
        ]
        if self.double_quant:
            found.append(Entry(f"{name}.nested_absmax", "F32", (-(-blocks // NESTED_BLOCK),)))
            found.append(Entry(f"{name}.nested_quant_map", "F32", (256,)))
        return tuple(found)

    def _state(self, spec: TensorSpec, mean: float) -> bytes:
        table: dict[str, Any] = {
            "quant_type": self.kind,
            "blocksize": BLOCK,
            "dtype": TORCH_NAMES[self.floats],
            "shape": list(spec.shape),
        }
        if not self.double_quant:
            return json.dumps(table).encode()
        table |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": mean}
        length = len(json.dumps({**table, "nested_offset": 0})) - 1 + LONGEST_NUMBER
        return json.dumps(table).ljust(length).encode()

    def pieces(self, checkpoint: Checkpoint, spec: TensorSpec) -> Iterator[tuple[str, np.ndarray]]:
        """Codes slab by slab, then scales and tables. Raises NumericalError for numbers beyond the floats."""
        if not self._rounds(spec):
            yield from float_pieces(checkpoint, spec, self.floats)
            return
        magnitudes = []
        for values in self._slabs(checkpoint, spec):
            codes, state = bnb.quantize_4bit(values, blocksize=BLOCK, quant_type=self.kind)
            magnitudes.append(state.absmax)
            yield spec.name, _bytes(codes)
        absmax, mean = torch.cat(magnitudes), 0.0
        yield f"{spec.name}.quant_map", _bytes(state.code)
        if self.double_quant:
            middle = absmax.mean()
            mean = float(middle)
            absmax, nested = bnb.quantize_blockwise(absmax - middle, blocksize=NESTED_BLOCK)
            yield f"{spec.name}.nested_absmax", _bytes(nested.absmax)
            yield f"{spec.name}.nested_quant_map", _bytes(nested.code)
        yield f"{spec.name}.absmax", _bytes(absmax)
        yield f"{spec.name}.quant_state.bitsandbytes__{self.kind}", np.frombuffer(self._state(spec, mean), np.uint8)

    def _slabs(self, checkpoint: Checkpoint, spec: TensorSpec) -> Iterator[Tensor]:
        """The numbers in the type that loaders compute in, in whole rows of whole blocks (the last may be short)."""
        rows, columns = spec.shape
        whole = BLOCK // math.gcd(columns, BLOCK)  # rows until a block ends where a row does
        step = max(1, SLAB // (columns * whole)) * whole
        packed, stored = checkpoint.packed(spec.name), checkpoint.tensors[spec.name].encoding
        for start in range(0, rows, step):
            part = packed[start : start + step]
            values = decode(part, stored, (len(part), columns)).to(getattr(torch, TORCH_NAMES[self.floats]))
            if not bool(torch.isfinite(values).all()):
                text = f'{self.floats} cannot hold its numbers; set float = "bf16" or "f32" in [bundle]'
                raise NumericalError(f"{spec.name}: {text}")
            yield values

    def decode(self, read: Callable[[str], Tensor], spec: TensorSpec) -> Tensor:
        """Code by code, from the tables that lie beside them."""
        if not self._rounds(spec):
            return read(spec.name).float()
        codes = read(spec.name).reshape(-1)
        absmax = read(f"{spec.name}.absmax")
        if self.double_quant:
            state = json.loads(bytes(read(f"{spec.name}.quant_state.bitsandbytes__{self.kind}").numpy()))
            scales = read(f"{spec.name}.nested_absmax").repeat_interleave(NESTED_BLOCK)[: len(absmax)]
            absmax = read(f"{spec.name}.nested_quant_map")[absmax.int()] * scales + state["nested_offset"]
        levels = read(f"{spec.name}.quant_map")
        values = torch.empty(spec.parameters)
        for start in range(0, spec.parameters, SLAB_DECODED):
            part = slice(start, min(start + SLAB_DECODED, spec.parameters))
            pair = codes[start // 2 : -(-part.stop // 2)]
            both = torch.stack((pair >> 4, pair & 15), -1).reshape(-1)[: part.stop - start]
            scale = absmax[start // BLOCK : -(-part.stop // BLOCK)].repeat_interleave(BLOCK)[: part.stop - start]
            values[part] = levels[both.int()] * scale
        return values.reshape(spec.shape)

    def quantization_config(self, graph: ModelGraph) -> dict[str, Any] | None:
        """What transformers' BitsAndBytesConfig writes; modules that stay floats are named, the head among them."""
        family = family_of(graph.config)
        kept = [spec for spec in graph.tensors if spec.is_linear and not self._rounds(spec)]
        modules = [family.module_name(spec.name).removesuffix(".weight") for spec in kept]
        return {
            "quant_method": "bitsandbytes",
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_compute_dtype": TORCH_NAMES[self.floats],
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": self.kind,
            "bnb_4bit_use_double_quant": self.double_quant,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": ["lm_head", *modules],
            "llm_int8_threshold": 6.0,
        }


def _bytes(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


@dataclass(frozen=True)
class BnbNf4(_Bnb):
    """bitsandbytes NF4: linear maps in 4 bits, on levels that suit normally distributed numbers."""

    name: ClassVar[str] = "bnb-nf4"
    kind: ClassVar[str] = "nf4"


@dataclass(frozen=True)
class BnbFp4(_Bnb):
    """bitsandbytes FP4: linear maps in 4-bit floating point."""

    name: ClassVar[str] = "bnb-fp4"
    kind: ClassVar[str] = "fp4"
