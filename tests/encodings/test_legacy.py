"""Blocks of 32 against gguf's own reading and writing of them."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from llmpack.encodings import encoding

NAMES = ("q8_0", "q4_0", "q5_0", "iq4_nl")


def random_rows(name, rows=5, columns=256, seed=0):
    """Random bytes with finite scales: every block starts with float16 numbers."""
    kind = encoding(name)
    generator = np.random.default_rng(seed)
    packed = generator.integers(0, 256, (rows, kind.row_bytes(columns)), dtype=np.uint8)
    blocks = packed.reshape(-1, kind.block_bytes)
    blocks[:, 1] &= 0x7B | 0x80
    return packed


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_decode_as_in_gguf_and_pack_back(name):
    kind = encoding(name)
    packed = random_rows(name)
    expected = quants.dequantize(packed, GGMLQuantizationType(kind.ggml_type))
    np.testing.assert_array_equal(kind.decode(packed, 256).numpy().view(np.uint32), expected.view(np.uint32))
    codes, grid = kind.unpack(packed, 256)
    np.testing.assert_array_equal(kind.pack(codes, grid), packed)


def test_q8_0_without_importance_is_the_reference():
    W = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    W[0] = 0
    W[1, :32] = torch.tensor([127.0, 0.5, 1.5, -0.5, -2.5, 3.5] + [0.0] * 26)
    np.testing.assert_array_equal(encoding("q8_0").encode(W), quants.quantize(W.numpy(), GGMLQuantizationType.Q8_0))


def test_the_sizes_are_gguf_s():
    for name in NAMES:
        kind = encoding(name)
        assert (kind.block, kind.block_bytes) == gguf.GGML_QUANT_SIZES[GGMLQuantizationType(kind.ggml_type)]
