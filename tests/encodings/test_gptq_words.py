"""The words of the GPTQ layout, bit for bit against packers that know one number at a time."""

import numpy as np
import pytest
import torch

from llmpack.encodings.gptq_words import dequantize, pack_words, pack_zeros, unpack_words, unpack_zeros


def slow_words(column, bits):
    """Words of one column of codes, by a big integer of all its bits."""
    stream = sum(int(code) << (bits * place) for place, code in enumerate(column))
    return [stream >> 32 * word & 0xFFFFFFFF for word in range(len(column) * bits // 32)]


def three_bits_as_auto_gptq_lists_them(column):
    """32 codes of 3 bits in 3 words: ten, one across, ten, one across, ten."""
    c = [int(code) for code in column]
    first = sum(c[k] << 3 * k for k in range(10)) | (c[10] & 3) << 30
    second = c[10] >> 2 | sum(c[11 + k] << 3 * k + 1 for k in range(10)) | (c[21] & 1) << 31
    third = c[21] >> 1 | sum(c[22 + k] << 3 * k + 2 for k in range(10))
    return [first, second, third]


def codes_of(bits, shape, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << bits, shape, dtype=np.uint8)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_those_of_a_slow_packer(bits):
    codes = codes_of(bits, (96, 5))
    words = pack_words(codes, bits)
    assert words.dtype == np.int32
    assert words.shape == (96 * bits // 32, 5)
    for column in range(5):
        assert words[:, column].view(np.uint32).tolist() == slow_words(codes[:, column], bits)
    np.testing.assert_array_equal(unpack_words(words, bits), codes)


def test_three_bits_lie_across_words_as_in_auto_gptq():
    codes = codes_of(3, (32, 7), seed=3)
    words = pack_words(codes, 3).view(np.uint32)
    for column in range(7):
        assert words[:, column].tolist() == three_bits_as_auto_gptq_lists_them(codes[:, column])


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zeros_lie_along_the_rows(bits, version):
    zeros = np.maximum(codes_of(bits, (64, 3)), 1)
    words = pack_zeros(zeros, bits, version)
    assert words.shape == (3, 64 * bits // 32)
    for group in range(3):
        less = [int(zero) - (version == 1) for zero in zeros[:, group]]
        assert words[group].view(np.uint32).tolist() == slow_words(less, bits)
    np.testing.assert_array_equal(unpack_zeros(words, bits, version), zeros)


def test_the_middle_zero_of_four_bits_is_the_nibble_that_loaders_know():
    middle = np.full((32, 1), 8)
    assert set(pack_zeros(middle, 4, 1).view(np.uint32).ravel().tolist()) == {0x77777777}
    assert set(pack_zeros(middle, 4, 2).view(np.uint32).ravel().tolist()) == {0x88888888}


def test_what_words_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="version 1 of the GPTQ layout has no zero of 0"):
        pack_zeros(np.zeros((32, 2), dtype=np.uint8), 4, 1)
    with pytest.raises(ValueError, match="33 rows are not a multiple of 32"):
        pack_words(np.zeros((33, 2), dtype=np.uint8), 4)
    with pytest.raises(ValueError, match="not a multiple of 3"):
        unpack_words(np.zeros((4, 2), dtype=np.int32), 3)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_groups_in_any_order_are_read(bits, version):
    """As desc_act = true leaves them: each input names its group."""
    rng = np.random.default_rng(bits)
    codes, zeros = codes_of(bits, (64, 32)), np.maximum(codes_of(bits, (32, 4), seed=1), 1)
    scales = rng.normal(size=(4, 32)).astype(np.float16)
    g_idx = rng.permutation(np.arange(64) // 16).astype(np.int32)
    tensors = [pack_words(codes, bits), pack_zeros(zeros, bits, version), scales, g_idx]
    values = dequantize(*map(torch.from_numpy, tensors), bits=bits, version=version)
    for row in range(32):
        for column in range(64):
            group = g_idx[column]
            step = int(codes[column, row]) - int(zeros[row, group])
            assert float(values[row, column]) == float(np.float32(scales[group, row]) * np.float32(step))
    with pytest.raises(ValueError, match="g_idx names groups"):
        dequantize(*map(torch.from_numpy, [*tensors[:3], g_idx + 1]), bits=bits, version=version)
