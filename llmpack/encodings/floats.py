"""Numbers stored one by one: f32, f16, bf16."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from llmpack.encodings.encoding import Encoding
from llmpack.encodings.tiles import matrix, packed_matrix

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    np = LazyModule("numpy")
    torch = LazyModule("torch")


class _Float(Encoding):
    """A float dtype of torch; rounds to nearest even."""

    block = 1
    dtype: ClassVar[str]

    def encode(self, W: Tensor, importance: Tensor | None = None) -> np.ndarray:
        """[rows, row bytes] uint8; `importance` makes no difference.

        Raises ValueError for infinities, NaN, and numbers beyond the largest of the dtype.
        """
        values = matrix(W, self.name).to(getattr(torch, self.dtype))
        if values.dtype != torch.float32 and not bool(torch.isfinite(values).all()):
            worst = float(W.abs().max())
            raise ValueError(f"{worst:g} is beyond {self.name}'s largest number, {torch.finfo(values.dtype).max:g}")
        plain = values.cpu().contiguous()
        return plain.view(torch.uint8).numpy().reshape(plain.shape[0], self.row_bytes(plain.shape[1])).copy()

    def decode(self, packed: np.ndarray, columns: int) -> Tensor:
        """[rows, columns] float32."""
        rows = packed_matrix(packed, self, columns)
        values = torch.from_numpy(np.array(rows, order="C")).view(getattr(torch, self.dtype))
        return values.to(torch.float32)


class F32(_Float):
    """IEEE single precision."""

    name, ggml_type, block_bytes, dtype = "f32", 0, 4, "float32"


class F16(_Float):
    """IEEE half precision."""

    name, ggml_type, block_bytes, dtype = "f16", 1, 2, "float16"


class BF16(_Float):
    """The upper half of a single precision number."""

    name, ggml_type, block_bytes, dtype = "bf16", 30, 2, "bfloat16"
