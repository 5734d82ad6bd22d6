"""Numbers stored one by one."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llmpack.encodings import encoding

NAMES = ("f32", "f16", "bf16")
ROW = hnp.arrays(np.float32, (2, 5), elements=st.floats(-65504, 65504, width=32))


@pytest.mark.parametrize("name", NAMES)
@given(values=ROW)
@settings(max_examples=40, deadline=None)
def test_bytes_and_numbers_are_gguf_s(name, values):
    kind = encoding(name)
    packed = kind.encode(torch.from_numpy(values))
    expected = quants.quantize(values, GGMLQuantizationType(kind.ggml_type))
    np.testing.assert_array_equal(packed, np.ascontiguousarray(expected).view(np.uint8).reshape(2, -1))
    back = quants.dequantize(expected, GGMLQuantizationType(kind.ggml_type)).astype(np.float32)
    np.testing.assert_array_equal(kind.decode(packed, 5).numpy(), back.reshape(2, 5))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_numbers_that_are_not_finite_are_refused(name, bad):
    W = torch.zeros(3, 4)
    W[1, 2] = bad
    with pytest.raises(ValueError, match="row 1, column 2"):
        encoding(name).encode(W)


@pytest.mark.parametrize(("name", "value"), [("f16", 65520.0), ("bf16", 3.4e38)])
def test_numbers_beyond_the_largest_are_refused(name, value):
    with pytest.raises(ValueError, match=f"beyond {name}'s largest"):
        encoding(name).encode(torch.tensor([[1.0, -value]]))


def test_vectors_and_foreign_bytes_are_refused():
    with pytest.raises(ValueError, match="has 1 dimensions"):
        encoding("f16").encode(torch.zeros(4))
    with pytest.raises(ValueError, match="4 columns of f16 are rows of 8 bytes"):
        encoding("f16").decode(np.zeros((2, 7), dtype=np.uint8), 4)


def test_the_bytes_are_a_copy():
    W = torch.zeros(2, 4)
    packed = encoding("f32").encode(W)
    W.fill_(1)
    assert not packed.any()
