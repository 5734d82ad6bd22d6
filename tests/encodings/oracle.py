"""llama.cpp's C functions and gguf's numpy ones, as judges of ours."""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants

from llmpack.encodings import ENCODINGS, encoding

INTS = ("int3_g32", "int4_g32_asym", "int4_g128", "int8_row", "int3_row_asym")  # of those that GGUF lacks
BLOCKED = tuple(name for name in ENCODINGS if name not in ("f32", "f16", "bf16") and not name.startswith("int"))
GRIDS = BLOCKED + INTS
HALVES = {"q2_k": (80, 82), "q3_k": (108,), "q6_k": (208,)} | dict.fromkeys(("q4_1", "q5_1", "q4_k", "q5_k"), (0, 2))
ROWS = {name: name.replace("_k", "_K") for name in BLOCKED}  # as C spells them


@cache
def library():
    """The C library under llama-cpp-python."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "lib"
    found = ctypes.CDLL(str(next(p for p in sorted(folder.iterdir()) if p.name.startswith("libggml-base."))))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    return found


def quantize(name, W, importance=None):
    """What llama.cpp makes of float32 rows, with an importance matrix or without."""
    kind = encoding(name)
    source = np.ascontiguousarray(W.numpy(), dtype=np.float32)
    weights = None if importance is None else np.ascontiguousarray(importance.numpy(), dtype=np.float32)
    packed = np.empty((W.shape[0], kind.row_bytes(W.shape[1])), dtype=np.uint8)
    written = library().ggml_quantize_chunk(
        kind.ggml_type,
        source.ctypes.data,
        packed.ctypes.data,
        0,
        *W.shape,
        None if weights is None else weights.ctypes.data,
    )
    assert written == packed.nbytes
    return packed


def dequantize_in_c(name, packed, columns):
    """The numbers that llama.cpp reads."""
    values = np.empty((packed.shape[0], columns), dtype=np.float32)
    read = getattr(library(), f"dequantize_row_{ROWS[name]}")
    read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    packed = np.ascontiguousarray(packed)
    read(packed.ctypes.data, values.ctypes.data, values.size)
    return values


def dequantize(name, packed):
    """The numbers that gguf reads."""
    return quants.dequantize(packed, GGMLQuantizationType(encoding(name).ggml_type))


def random_bytes(name, rows=5, columns=512, seed=0):
    """Rows of any bytes at all, but for the exponents of scales, which are finite."""
    kind = encoding(name)
    packed = np.random.default_rng(seed).integers(0, 256, (rows, kind.row_bytes(columns)), dtype=np.uint8)
    if name == "mxfp4":
        packed.reshape(-1, kind.block_bytes)[:, 0] &= 0x7F
        return packed
    if name in INTS:
        *_, grid = kind.unpack(packed, columns)
        blocks = packed.reshape(-1, packed.shape[1] // (columns // grid.group))
        places = (blocks.shape[1] - (2 if kind.is_symmetric else 3),)
    else:
        blocks, places = packed.reshape(-1, kind.block_bytes), HALVES.get(name, (0,))
    for place in places:
        blocks[:, place + 1] &= 0xBB
    return packed


def weighted_error(W, Q, importance=None):
    """Sum of squares, weighted by column, in float64."""
    square = (W.double() - Q.double()).square()
    return float((square if importance is None else square * importance.double()).sum())


def numbers(shape, kind="gauss", seed=0, scale=0.02):
    """Weights as they come: "gauss", "heavy" tails, or "shifted" so that zero is rare."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    if kind == "heavy":
        values = values / torch.rand(shape, generator=generator).clamp(min=0.02).sqrt()
    return (values + 1.5 if kind == "shifted" else values) * scale


def importance_of(columns, seed=0):
    """Mean squared inputs that differ by orders of magnitude, with outliers, as in trained models."""
    generator = torch.Generator().manual_seed(seed + 100)
    importance = torch.exp(1.5 * torch.randn(columns, generator=generator))
    importance[torch.randperm(columns, generator=generator)[: columns // 100]] *= 300
    return importance


def not_vanishing(value: float) -> float:
    """`value`, or 0 where the reciprocal of a scale overflows: there the reference has no answer to compare with."""
    return value if abs(value) > 1e-25 else 0.0
