"""The byte side, held to gguf's numpy code and llama.cpp's C code."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llmpack.encodings import bits, encoding
from tests.encodings import oracle


def same_bits(a, b):
    np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


@pytest.mark.parametrize("name", oracle.BLOCKED)
def test_any_bytes_decode_as_in_gguf_and_pack_back(name):
    kind, packed = encoding(name), oracle.random_bytes(name)
    same_bits(kind.decode(packed, 512), oracle.dequantize(name, packed))
    codes, grid = kind.unpack(packed, 512)
    assert codes.dtype == torch.int32
    np.testing.assert_array_equal(kind.pack(codes, grid), packed)
    np.testing.assert_array_equal(kind.pack(codes.to(torch.uint8), grid), packed)


@pytest.mark.parametrize("name", oracle.GRIDS)
def test_even_scales_that_are_not_numbers_pack_back(name):
    kind = encoding(name)
    packed = np.random.default_rng(1).integers(0, 256, (9, kind.row_bytes(512)), dtype=np.uint8)
    np.testing.assert_array_equal(kind.pack(*kind.unpack(packed, 512)), packed)


@pytest.mark.parametrize("name", oracle.BLOCKED)
def test_llama_cpp_reads_what_we_write_as_we_read_it(name):
    kind = encoding(name)
    packed = kind.encode(oracle.numbers((6, 512)), oracle.importance_of(512))
    ours, theirs = kind.decode(packed, 512).numpy(), oracle.dequantize_in_c(name, packed, 512)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=np.abs(ours).max() * 2**-22)  # C may fuse multiply and add


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", oracle.BLOCKED)
def test_what_llama_cpp_writes_packs_back(name, weighted):
    kind, importance = encoding(name), oracle.importance_of(768) if weighted else None
    packed = oracle.quantize(name, oracle.numbers((6, 768)), importance)
    codes, grid = kind.unpack(packed, 768)
    np.testing.assert_array_equal(kind.pack(codes, grid), packed)
    same_bits(grid.levels().decode(codes), oracle.dequantize(name, packed))


@pytest.mark.parametrize("name", oracle.BLOCKED)
def test_sizes_are_gguf_s(name):
    kind = encoding(name)
    assert (kind.block, kind.block_bytes) == gguf.GGML_QUANT_SIZES[GGMLQuantizationType(kind.ggml_type)]
    assert GGMLQuantizationType(kind.ggml_type).name.lower() == name
    assert kind.nbytes((3, 512)) == 3 * kind.row_bytes(512) == kind.encode(torch.zeros(3, 512)).nbytes


@pytest.mark.parametrize("name", oracle.GRIDS)
def test_decode_works_in_runs_of_rows(name, monkeypatch):
    kind, packed = encoding(name), oracle.random_bytes(name, rows=7)
    whole = kind.decode(packed, 512)
    monkeypatch.setattr("llmpack.encodings.tiles.SLAB", 1024)
    runs, unpack = [], kind.unpack
    monkeypatch.setattr(type(kind), "unpack", lambda _, rows, columns: runs.append(len(rows)) or unpack(rows, columns))
    same_bits(kind.decode(packed, 512), whole)
    assert runs == [2, 2, 2, 1]


@pytest.mark.parametrize("name", oracle.GRIDS)
def test_foreign_codes_grids_and_bytes_are_refused(name):
    kind, other = encoding(name), encoding("q4_1" if name == "q4_0" else "q4_0")
    codes, grid = kind.unpack(oracle.random_bytes(name), 512)
    for wrong in (codes[:2], codes - 1000, codes + 1000):
        with pytest.raises(ValueError, match="codes"):
            kind.pack(wrong, grid)
    with pytest.raises(ValueError, match=f"not fitted for {name}"):
        kind.pack(codes, other.unpack(oracle.random_bytes(other.name), 512)[1])
    packed = oracle.random_bytes(name)
    for wrong in (packed[:, :-1], packed[0], packed.astype(np.int16)):
        with pytest.raises(ValueError, match="512 columns of"):
            kind.decode(wrong, 512)
    with pytest.raises(ValueError, match="not a multiple"):
        kind.decode(packed, 500)


@given(hnp.arrays(np.float32, (2, 64), elements=st.floats(-(2.0**20), 2.0**20, width=32).map(oracle.not_vanishing)))
@settings(max_examples=60, deadline=None)
def test_q8_0_without_importance_is_the_reference(values):
    expected = gguf.quants.quantize(values, GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(encoding("q8_0").encode(torch.from_numpy(values)), expected)


def test_q8_0_rounds_ties_away_from_zero():
    W = torch.zeros(1, 32)
    W[0, :9] = torch.tensor([127.0, 0.5, 1.5, -0.5, -2.5, 3.5, 0.49999997, -0.49999997, 126.5])
    np.testing.assert_array_equal(encoding("q8_0").encode(W), oracle.quantize("q8_0", W))


@given(st.sampled_from([(1, 1), (1, 32), (2, 4), (2, 32), (4, 8), (4, 64)]), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_fields_come_back(form, runs, seed):
    width, span = form
    values = np.random.default_rng(seed).integers(0, 1 << width, (3, runs * span * 8 // width), dtype=np.uint8)
    packed = bits.pack_fields(values, width, span)
    assert packed.shape == (3, values.shape[1] * width // 8)
    np.testing.assert_array_equal(bits.unpack_fields(packed, width, span), values)
