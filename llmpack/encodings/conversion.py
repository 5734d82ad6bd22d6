"""From int groups to blocks of GGUF without a second quantization: the same codes, where the grids agree.

    from                 to     what changes
    -------------------  -----  ------------------------------------------------------------------------------
    int4, symmetric      q4_0   nothing: a scale of more than 32 columns is repeated
    int8, symmetric      q8_0   nothing
    int4, asymmetric     q4_1   ``scale * (code - zero)`` becomes ``scale * code + minimum``, the minimum in float16

Other widths have no block of GGUF with their levels, and columns in activation order are no neighbours, as those of a
block are. Rounding them again is a second quantization, which loses more than quantizing the source to that encoding;
so only a step that is told so does it (`requantize`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmpack.encodings import encoding
from llmpack.encodings.encoding import GridEncoding
from llmpack.encodings.grids import BlockGrid, ScaleGrid, ZeroGrid
from llmpack.encodings.names import INT_NAMES, int_options
from llmpack.encodings.search import to_half

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

BLOCK = 32
_BLOCKS = {(4, True): "q4_0", (8, True): "q8_0", (4, False): "q4_1"}


def block_encoding(name: str) -> str | None:
    """The encoding of GGUF that holds the codes of `name`, or None where there is none."""
    if name not in INT_NAMES:
        return None
    options = int_options(name)
    return None if options.act_order else _BLOCKS.get((options.bits, options.symmetric))


def is_exact(name: str) -> bool:
    """Whether every number stays what it is; else minima are rounded."""
    return block_encoding(name) is not None and int_options(name).symmetric


def as_blocks(packed: np.ndarray, name: str, columns: int) -> np.ndarray:
    """Packed rows of `name` as packed rows of ``block_encoding(name)``. Raises ValueError where there is none."""
    wanted = block_encoding(name)
    if wanted is None:
        raise ValueError(f"no encoding of GGUF has the levels of {name}")
    before, after = encoding(name), encoding(wanted)
    if not isinstance(before, GridEncoding) or not isinstance(after, GridEncoding):
        raise AssertionError(f"{name} and {wanted} have grids")
    codes, grid = before.unpack(packed, columns)
    if not isinstance(grid, ScaleGrid):
        raise AssertionError(f"{name} has a scale per group")
    per = grid.group // BLOCK
    scales = grid.scales.repeat_interleave(per, dim=1)
    minima = None
    if isinstance(grid, ZeroGrid):
        minima = to_half(-scales * grid.zeros.repeat_interleave(per, dim=1)).to(torch.float16)
    return after.pack(codes, BlockGrid(scales.to(torch.float16), minima, grid.steps, BLOCK))
