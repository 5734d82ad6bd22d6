"""How float32 matrices are multiplied: as they are, or with operands rounded to bfloat16 and sums in float32.

Processors with instructions for bfloat16 multiply it several times faster. Everything else stays float32: weights,
hidden states, what is added up over tokens. Rounding an operand moves it by at most one part in 512, at random.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from llmpack.lazy import LazyModule

torch: Any = LazyModule("torch")  # the switches that are set here are not in its annotations

Products = Literal["f32", "bf16"]


def has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32, and torch makes use of it."""
    cpu = torch.cpu
    return bool(
        torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and (cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported())
    )


@contextmanager
def products(kind: Products) -> Iterator[None]:
    """Multiply float32 matrices in one of the two ways, in all threads, while it is open."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16" if kind == "bf16" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
