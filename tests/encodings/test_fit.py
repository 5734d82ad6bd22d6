"""Scale searches: how near the optimum, and never behind llama.cpp."""

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llmpack.encodings import encoding
from llmpack.encodings.search import Groups, affine, symmetric, to_half
from llmpack.encodings.steps import Steps
from tests.encodings import oracle

IQ4 = encoding("iq4_nl").steps


def best_of_all_halves(x, w, multiples):
    """Least weighted error of one block over every float16 scale, float64."""
    top = np.abs(x).max() / np.abs(multiples).max()
    scales = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    scales = scales[(scales > 0.4 * top) & (scales < 4 * top)]
    scales = np.concatenate([scales, -scales])
    middles = (multiples[1:] + multiples[:-1]) / 2
    values = multiples[np.searchsorted(middles, x[None] / scales[:, None])] * scales[:, None]
    return (w * (values - x) ** 2).sum(1).min()


@pytest.mark.parametrize("steps", [Steps(-4, 3), Steps(-8, 7), Steps(-16, 15), IQ4], ids=str)
def test_the_symmetric_search_is_near_the_best_of_all_scales(steps):
    x = oracle.numbers((32, 40), "heavy", scale=1.0)
    w = oracle.importance_of(32 * 40).reshape(32, 40)
    scale, error = symmetric(Groups(x, w, steps), to_half)
    assert torch.equal(scale, scale.half().float())
    multiples = np.array(steps.table or range(steps.low, steps.high + 1), dtype=np.float64)
    best = [best_of_all_halves(x[:, i].double().numpy(), w[:, i].double().numpy(), multiples) for i in range(40)]
    ratio = error.double().numpy() / np.array(best)
    assert ratio.min() > 1 - 1e-3
    assert ratio.mean() < 1.06
    assert ratio.max() < 1.8


def best_line(x, w, high):
    """Least weighted error of one block over many ranges, each followed by least squares to the end; float64."""
    low, span, best = x.min(), np.ptp(x), np.inf
    for below in np.linspace(-0.1, 0.5, 25):
        for above in np.linspace(-0.1, 0.5, 25):
            if below + above > 0.8:
                continue
            scale, offset = span * (1 - below - above) / high, low + below * span
            for _ in range(6):
                q = np.clip(np.rint((x - offset) / scale), 0, high)
                if np.ptp(q) == 0:
                    break
                scale, offset = np.polyfit(q, x, 1, w=np.sqrt(w))
                best = min(
                    best, (w * (np.clip(np.rint((x - offset) / scale), 0, high) * scale + offset - x) ** 2).sum()
                )
    return best


@pytest.mark.parametrize("high", [3, 15])
def test_the_affine_search_is_near_a_long_search(high):
    x, w = oracle.numbers((32, 6), scale=1.0), oracle.importance_of(192).reshape(32, 6)
    _, _, error = affine(Groups(x, w, Steps(0, high)), to_half, below_zero=False)
    best = [best_line(x[:, i].double().numpy(), w[:, i].double().numpy(), high) for i in range(6)]
    assert (error.double().numpy() / np.array(best)).mean() < 1.1


@pytest.mark.parametrize("kind", ["gauss", "heavy", "shifted"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("name", oracle.BLOCKED)
def test_rounding_is_at_least_as_good_as_llama_cpp_s(name, weighted, kind):
    W, importance = oracle.numbers((24, 768), kind, seed=3), oracle.importance_of(768)
    given = importance if weighted else None
    ours = oracle.weighted_error(W, encoding(name).decode(encoding(name).encode(W, given), 768), given)
    packed = oracle.quantize(name, W, given)
    theirs = oracle.weighted_error(W, torch.from_numpy(oracle.dequantize(name, packed)), given)
    assert ours <= theirs * (1 + 1e-9)


@pytest.mark.parametrize("name", oracle.BLOCKED)
def test_rounding_real_tensors_is_at_least_as_good_as_llama_cpp_s(name, demo_gguf):
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(demo_gguf).tensors}
    for part in ("blk.7.ffn_down.weight", "blk.22.attn_output.weight"):
        W = torch.from_numpy(quants.dequantize(tensors[part].data[:64], tensors[part].tensor_type).copy())
        W = W[:, : W.shape[1] // 256 * 256]
        W = W * (1 + 0.1 * oracle.numbers(W.shape, scale=1.0))  # off the grid that it was read from
        importance = oracle.importance_of(W.shape[1], seed=1)
        packed = encoding(name).encode(W, importance)
        ours = oracle.weighted_error(W, encoding(name).decode(packed, W.shape[1]), importance)
        packed = oracle.quantize(name, W, importance)
        theirs = oracle.weighted_error(W, torch.from_numpy(oracle.dequantize(name, packed)), importance)
        assert ours < theirs


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1"])
@given(
    values=hnp.arrays(np.float32, (1, 64), elements=st.floats(-1e4, 1e4, width=32).map(oracle.not_vanishing)),
    scale=st.sampled_from([1.0, 1e-3, 1e-6, 1e-9]),
)
@settings(max_examples=40, deadline=None)
def test_no_block_is_worse_than_by_the_reference_s_scale(name, values, scale):
    kind, W = encoding(name), torch.from_numpy(values) * scale
    packed = quants.quantize(W.numpy(), gguf.GGMLQuantizationType(kind.ggml_type))
    theirs = torch.from_numpy(oracle.dequantize(name, packed))
    ours = kind.decode(kind.encode(W), 64)
    for block in (slice(0, 32), slice(32, 64)):
        mine, reference = (oracle.weighted_error(W[:, block], Q[:, block]) for Q in (ours, theirs))
        assert mine <= reference * (1 + 1e-4) + 1e-12 * float(W[:, block].double().square().sum())


@pytest.mark.parametrize("name", oracle.GRIDS)
def test_rounding_takes_the_nearest_code(name):
    kind, W = encoding(name), oracle.numbers((4, 512))
    grid = kind.fit(W, oracle.importance_of(512))
    levels = grid.levels()
    codes = kind.round(W, grid).codes
    error = (levels.decode(codes) - W).abs()
    for code in range(levels.high + 1):
        other = (levels.decode(torch.full_like(codes, code)) - W).abs()
        assert bool((error <= other + 1e-7).all())


@pytest.mark.parametrize("name", oracle.GRIDS)
def test_encode_is_fit_and_round_whatever_the_tiles(name, monkeypatch):
    kind, W, importance = encoding(name), oracle.numbers((9, 512)), oracle.importance_of(512)
    whole = kind.encode(W, importance)
    np.testing.assert_array_equal(kind.round(W, kind.fit(W, importance)).pack(), whole)
    monkeypatch.setattr("llmpack.encodings.tiles.TILE", 1024)
    monkeypatch.setattr("llmpack.encodings.tiles.SLAB", 2048)
    np.testing.assert_array_equal(kind.encode(W, importance), whole)
    np.testing.assert_array_equal(kind.encode(W, importance * 2.0**-60), whole)


@pytest.mark.parametrize("name", oracle.BLOCKED)
def test_what_lies_on_the_grid_is_kept(name):
    kind = encoding(name)
    packed = oracle.quantize(name, oracle.numbers((4, 512)), oracle.importance_of(512))
    W = kind.decode(packed, 512)
    again = kind.decode(kind.encode(W, torch.ones(512)), 512)
    assert oracle.weighted_error(W, again) < 2e-3 * float(W.double().square().sum())
