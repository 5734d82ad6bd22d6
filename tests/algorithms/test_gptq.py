"""GPTQ and its refinement, against their definitions in float64."""

import itertools

import numpy as np
import pytest
import torch

from llmpack.algorithms.gptq import gptq, objective, refine, relative_error, round_together
from llmpack.algorithms.hessian import factorize
from llmpack.encodings import ENCODINGS, encoding
from llmpack.encodings.encoding import GridEncoding
from llmpack.encodings.names import INT_NAMES

INTS = {"int3_g64_asym", "int4_g32_act"}  # zeros that vary, groups of any columns; the other ones are as q4_0
GRIDS = [
    name
    for name, kind in ENCODINGS.items()
    if issubclass(kind, GridEncoding) and kind.joint_columns == 1 and (name in INTS or name not in INT_NAMES)
]


def problem(rows, columns, seed=0, tokens=2000):
    """Weights, and second moments like those of a trained layer: low rank, outlier channels, some noise."""
    rng = np.random.default_rng(seed)
    rank = columns // 4
    mix = rng.normal(size=(rank, columns)) * np.exp(0.7 * rng.normal(size=columns))
    x = rng.normal(size=(tokens, rank)) @ mix / rank**0.5 + 0.3 * rng.normal(size=(tokens, columns))
    x[:, rng.integers(columns, size=2)] *= 12
    W = rng.standard_t(5, size=(rows, columns)) * 0.03
    return torch.from_numpy(W.astype("f4")), torch.from_numpy((x.T @ x / tokens).astype("f4"))


def level_values(grid):
    """[rows, columns, codes] float64: every value that the file can hold at each place."""
    levels = grid.levels()
    codes = torch.arange(levels.high + 1)
    places = torch.ones(grid.rows, grid.columns, dtype=torch.int32)
    return np.stack([levels.to(torch.float64).decode(places * int(c)).numpy() for c in codes], axis=-1)


def one_zero(name, codes):
    """Codes by what they mean: mxfp4 has two for zero."""
    return np.where(codes == 7, 8, codes) if name == "mxfp4" else codes


def nearest(values, wanted):
    """[rows]: the code whose value is nearest, by looking at all of them."""
    return np.abs(values - wanted[:, None]).argmin(axis=1)


def damped(H, damping):
    H = H.numpy().astype(np.float64)
    return H + damping * np.trace(H) / len(H) * np.eye(len(H))


def slow_gptq(W, H, grid, damping, order):
    """Optimal Brain Quantization with a given order: after each column the rest moves to the constrained optimum.

    Frantar et al. 2022, equations 2 and 3: the inverse of the Hessian of the columns that are left is
    formed anew at every column.
    """
    W = W.numpy().astype(np.float64).copy()
    H = damped(H, damping)
    values = level_values(grid)
    left = list(np.argsort(-np.diag(H), kind="stable") if order == "activation" else range(len(H)))
    codes = np.zeros(W.shape, dtype=np.int64)
    while left:
        k = left[0]
        inverse = np.linalg.inv(H[np.ix_(left, left)])
        codes[:, k] = nearest(values[:, k], W[:, k])
        error = W[:, k] - np.take_along_axis(values[:, k], codes[:, k, None], 1)[:, 0]
        W[:, left] -= np.outer(error / inverse[0, 0], inverse[0])
        left.pop(0)
    return codes


def fitted(name, W, H):
    return encoding(name), encoding(name).fit(W, torch.diagonal(H))


@pytest.mark.parametrize("order", ["activation", "natural"])
@pytest.mark.parametrize("name", GRIDS)
def test_in_float64_every_code_is_that_of_the_definition(name, order):
    W, H = problem(24, 256)
    enc, grid = fitted(name, W, H)
    codes = gptq(W.double(), H, grid, enc, damping=0.01, order=order).codes
    assert np.array_equal(one_zero(name, codes.numpy()), one_zero(name, slow_gptq(W, H, grid, 0.01, order)))


@pytest.mark.parametrize("order", ["activation", "natural"])
@pytest.mark.parametrize("name", GRIDS)
def test_float32_weights_give_the_codes_and_the_objective_of_the_definition(name, order):
    W, H = problem(64, 256, seed=1)
    enc, grid = fitted(name, W, H)
    ours = gptq(W, H, grid, enc, damping=0.01, order=order)
    slow = torch.from_numpy(slow_gptq(W, H, grid, 0.01, order)).int()
    same = ours.decode() == grid.levels().decode(slow)
    assert float(same.double().mean()) >= 0.999
    wanted = objective(W, grid.levels().decode(slow), H)
    assert objective(W, ours.decode(), H) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", GRIDS)
def test_float32_arithmetic_loses_few_codes(name):
    W, H = problem(512, 256, seed=1)
    enc, grid = fitted(name, W, H)
    quick = round_together([W], factorize(H, dtype=torch.float32), [grid], enc)[0].quantized
    exact = gptq(W, H, grid, enc)
    assert float((quick.codes == exact.codes).double().mean()) >= 0.999
    assert objective(W, quick.decode(), H) == pytest.approx(objective(W, exact.decode(), H), rel=1e-3)


@pytest.mark.parametrize("name", GRIDS)
def test_compensation_beats_rounding_to_nearest_by_far(name):
    W, H = problem(64, 512)
    enc, grid = fitted(name, W, H)
    plain = relative_error(W, enc.round(W, grid).decode(), H)
    assert relative_error(W, gptq(W, H, grid, enc).decode(), H) < 0.5 * plain


def test_columns_without_cross_terms_round_to_nearest():
    W, H = problem(16, 64)
    enc, grid = fitted("iq4_nl", W, H)
    alone = gptq(W, torch.diag(torch.diagonal(H)), grid, enc)
    assert torch.equal(alone.codes.int(), enc.round(W, grid).codes.int())


def test_dead_columns_round_to_nearest_and_leave_the_others_alone():
    W, H = problem(16, 96)
    dead = [0, 40, 95]
    H[dead], H[:, dead] = 0, 0
    enc, grid = fitted("q4_0", W, H)
    ours = gptq(W, H, grid, enc)
    assert torch.equal(ours.codes[:, dead].int(), enc.round(W, grid).codes[:, dead].int())
    moved = W.clone()
    moved[:, dead] += 1
    again = gptq(moved, H, grid, enc)
    alive = [c for c in range(96) if c not in dead]
    assert torch.equal(ours.codes[:, alive], again.codes[:, alive])


@pytest.mark.parametrize("name", GRIDS)
def test_matrices_that_share_an_input_round_together_as_they_do_alone(name):
    W, H = problem(40, 256)
    factor = factorize(H)
    parts = list(torch.split(W, [25, 15]))
    grids = [fitted(name, part, H)[1] for part in parts]
    together = round_together(parts, factor, grids, encoding(name))
    for part, grid, one in zip(parts, grids, together, strict=True):
        assert torch.equal(one.quantized.codes, gptq(part, H, grid, encoding(name)).codes)
        assert one.quantized.grid is grid


def test_clipped_counts_values_beyond_the_last_code():
    W, H = problem(8, 64)
    enc, grid = fitted("q4_0", W, H)
    inside = round_together([W], factorize(torch.diag(torch.diagonal(H))), [grid], enc)[0]
    outside = round_together([W * 4], factorize(torch.diag(torch.diagonal(H))), [grid], enc)[0]
    values = level_values(grid)
    step = np.abs(values[..., 1] - values[..., 0])
    wanted = W.double().numpy() * 4
    beyond = (wanted > values.max(-1) + step / 2) | (wanted < values.min(-1) - step / 2)
    assert outside.clipped == pytest.approx(beyond.mean())
    assert inside.clipped < 0.05


def slow_descent(W, H, codes, values):
    """One sweep: each column tries all codes with the whole objective written out."""
    W, H = W.numpy().astype(np.float64), H.numpy().astype(np.float64)
    codes = codes.numpy().astype(np.int64).copy()
    error = W - np.take_along_axis(values, codes[..., None], 2)[..., 0]
    for k in np.argsort(-np.diag(H), kind="stable"):
        costs = []
        for code in range(values.shape[-1]):
            error[:, k] = W[:, k] - values[:, k, code]
            costs.append(((error @ H) * error).sum(1))
        codes[:, k] = np.argmin(costs, axis=0)
        error[:, k] = W[:, k] - np.take_along_axis(values[:, k], codes[:, k, None], 1)[:, 0]
    return codes


@pytest.mark.parametrize("name", [name for name in GRIDS if name != "q8_0"])
def test_refinement_is_coordinate_descent_and_only_lowers_the_objective(name):
    W, H = problem(12, 256)
    H = torch.from_numpy(damped(H, 0.01)).double()
    enc, grid = fitted(name, W, H.float())
    start = gptq(W, H, grid, enc)
    once = refine(W.double(), H, start, sweeps=1)
    slow = slow_descent(W, H, start.codes, level_values(grid))
    assert np.array_equal(one_zero(name, once.codes.numpy()), one_zero(name, slow))
    costs = [objective(W, refine(W, H, start, sweeps=n).decode(), H) for n in range(5)]
    assert costs[0] == objective(W, start.decode(), H)
    assert all(after <= before for before, after in itertools.pairwise(costs))
    assert costs[-1] < costs[0]


def test_objective_is_the_mean_squared_error_of_the_outputs():
    rng = np.random.default_rng(3)
    x, W, Q = (torch.from_numpy(rng.normal(size=shape)) for shape in ((50, 8), (5, 8), (5, 8)))
    error = float(((x @ (W - Q).T) ** 2).sum() / 50)
    assert objective(W, Q, x.T @ x / 50) == pytest.approx(error)
    assert relative_error(W, Q, x.T @ x / 50) == pytest.approx(error / float(((x @ W.T) ** 2).sum() / 50))
    assert relative_error(0 * W, 0 * W, x.T @ x) == 0.0
