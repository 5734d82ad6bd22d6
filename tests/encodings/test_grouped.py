"""Int groups of the GPTQ layout: their names, their bytes, and the search for a scale and a zero."""

import numpy as np
import pytest
import torch

from llmpack.encodings import ENCODINGS, encoding
from llmpack.encodings.names import INT_NAMES, ORDERED_NAMES, int_options
from llmpack.encodings.search import to_unit
from llmpack.encodings.steps import Steps
from llmpack.encodings.zeros import ZeroGroups, with_zero
from tests.encodings import oracle


@pytest.mark.parametrize("name", [name for name in INT_NAMES if name not in ORDERED_NAMES])
def test_every_name_is_an_encoding_of_its_options(name):
    kind = encoding(name)
    width, group, symmetric, _ = int_options(name)
    assert (kind.name, kind.bits, kind.group, kind.is_symmetric) == (name, width, group, symmetric)
    W = oracle.numbers((3, 256), "shifted" if "asym" in name else "gauss")
    codes, grid = kind.unpack(kind.encode(W, oracle.importance_of(256)), 256)
    groups = 1 if group < 0 else 256 // group
    assert grid.scales.shape == (3, groups)
    assert kind.nbytes((3, 256)) == 3 * (256 * width // 8 + groups * (2 if symmetric else 3))
    assert 0 <= int(codes.min()) <= int(codes.max()) < 1 << width
    zero = torch.as_tensor(grid.levels().zero).expand(3, 256)
    assert bool((zero == 1 << (width - 1)).all()) is symmetric
    scale = grid.scales[:, torch.arange(256) // (256 // groups)]
    assert torch.equal(grid.levels().decode(codes), scale * (codes - zero))
    assert torch.equal(scale, scale.half().float())


def test_names_that_are_none():
    assert set(INT_NAMES) < set(ENCODINGS)
    with pytest.raises(ValueError, match="int4_g128_asym"):
        int_options("q4_0")
    with pytest.raises(ValueError, match="rows of 96 are not a multiple of int4_g64's block of 64"):
        encoding("int4_g64").row_bytes(96)
    assert "rows of 40" in (encoding("int3_row").problem(40) or "")
    assert encoding("int3_row").problem(96) is None


@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_any_codes_come_back(width):
    kind = encoding(f"int{width}_g32_asym")
    packed = np.random.default_rng(width).integers(0, 256, (4, kind.row_bytes(96)), dtype=np.uint8)
    packed.reshape(4, 3, -1)[:, :, -2] &= 0xBB  # finite scales
    packed.reshape(4, 3, -1)[:, :, -1] &= (1 << width) - 1
    codes, grid = kind.unpack(packed, 96)
    np.testing.assert_array_equal(kind.pack(codes, grid), packed)


def slow_best(x, w, high):
    """Least weighted error of one group over every zero and many scales, each followed by least squares; float64."""
    best = (w * x**2).sum()
    top = max(np.abs(x).max(), 1e-30)
    for zero in range(high + 1):
        for scale in top / np.geomspace(0.5, 2.5 * high, 120):
            q = np.clip(np.rint(x / scale), -zero, high - zero)
            if not q.any():
                continue
            fitted = (w * x * q).sum() / (w * q * q).sum()
            best = min(best, (w * (x - fitted * q) ** 2).sum())
    return best


@pytest.mark.parametrize("kind", ["gauss", "heavy", "shifted"])
@pytest.mark.parametrize("high", [3, 7, 15])
def test_the_search_for_scale_and_zero_is_near_that_over_all(high, kind):
    x, w = oracle.numbers((32, 12), kind, scale=1.0), oracle.importance_of(32 * 12).reshape(32, 12)
    scale, zero, error = with_zero(ZeroGroups(x, w, Steps(0, high)), to_unit)
    assert torch.equal(scale, scale.half().float())
    assert torch.equal(zero, zero.round().clamp(0, high))
    q = torch.maximum(torch.minimum((x / scale).round(), high - zero), -zero)
    assert torch.allclose(error, (w * (x - scale * q).square()).sum(0), rtol=1e-3)
    best = [slow_best(x[:, i].double().numpy(), w[:, i].double().numpy(), high) for i in range(12)]
    assert (error.double().numpy() / np.array(best)).mean() < 1.12


@pytest.mark.parametrize("kind", ["gauss", "heavy", "shifted"])
@pytest.mark.parametrize("pair", [("int2_g32", "int2_g32_asym"), ("int4_g128", "int4_g128_asym")], ids=lambda p: p[0])
def test_a_zero_of_its_own_loses_nothing(pair, kind):
    W, importance = oracle.numbers((24, 512), kind, seed=3), oracle.importance_of(512)
    errors = [
        oracle.weighted_error(W, encoding(name).decode(encoding(name).encode(W, importance), 512), importance)
        for name in pair
    ]
    assert errors[1] < errors[0] * (0.8 if kind == "shifted" else 1.02)
