"""Int groups as blocks of GGUF: the same codes, read by gguf as by us."""

import numpy as np
import pytest
import torch

from llmpack.encodings import encoding
from llmpack.encodings.conversion import as_blocks, block_encoding, is_exact
from llmpack.encodings.names import INT_NAMES, ORDERED_NAMES, int_options
from tests.encodings import oracle

CONVERTIBLE = [name for name in INT_NAMES if block_encoding(name)]


def test_which_convert():
    of_neighbours = [int_options(name) for name in INT_NAMES if name not in ORDERED_NAMES]
    assert {int_options(name) for name in CONVERTIBLE} == {
        one for one in of_neighbours if one.bits == 4 or (one.bits == 8 and one.symmetric)
    }
    assert block_encoding("q4_0") is None
    assert block_encoding("int4_g64") == "q4_0"
    assert block_encoding("int8_row") == "q8_0"
    assert (block_encoding("int4_g32_asym"), is_exact("int4_g32_asym")) == ("q4_1", False)
    with pytest.raises(ValueError, match="no encoding of GGUF has the levels of int3_g32"):
        as_blocks(np.zeros((1, 14), dtype=np.uint8), "int3_g32", 32)


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_codes_stay_and_so_do_numbers_but_for_minima_in_float16(name):
    kind, wanted = encoding(name), block_encoding(name)
    W = oracle.numbers((6, 256), "heavy" if is_exact(name) else "shifted")
    packed = kind.encode(W, oracle.importance_of(256))
    blocks = as_blocks(packed, name, 256)
    codes, grid = kind.unpack(packed, 256)
    assert torch.equal(encoding(wanted).unpack(blocks, 256)[0], codes)
    before, after = kind.decode(packed, 256), torch.from_numpy(oracle.dequantize(wanted, blocks))
    if is_exact(name):
        assert torch.equal(after, before)
    else:
        levels = grid.levels()
        minimum = -levels.scale * levels.zero
        assert torch.allclose(after - before, minimum.half().float() - minimum, atol=1e-7)
        assert 0 < float((after - before).abs().max()) <= 2**-11 * float(minimum.abs().max())


@pytest.mark.parametrize(("name", "block"), [("int4_g32", "q4_0"), ("int8_g32", "q8_0")])
def test_groups_of_32_are_rounded_as_the_blocks_are(name, block):
    W, importance = oracle.numbers((5, 128)), oracle.importance_of(128)
    blocks = as_blocks(encoding(name).encode(W, importance), name, 128)
    np.testing.assert_array_equal(blocks, encoding(block).encode(W, importance))


def test_a_grid_with_zeros_is_not_taken_for_one_with_minima():
    kind = encoding("int4_g32_asym")
    with pytest.raises(ValueError, match="not fitted for q4_1"):
        encoding("q4_1").pack(*kind.unpack(kind.encode(oracle.numbers((5, 128))), 128))
