"""Grids as quantizers use them: any columns in any order, some rows, scales moved after rounding."""

import dataclasses

import numpy as np
import pytest
import torch

from llmpack.encodings import encoding
from llmpack.encodings.encoding import Levels
from tests.encodings import oracle


def hessian(columns, seed=0):
    """Inputs that go together, with a few loud columns; float32, and the float64 that it was."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5 + torch.eye(columns)
    x = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64) @ mix
    x = x * oracle.importance_of(columns).double().sqrt()
    H = x.T @ x / len(x)
    return H.float(), H


def row_errors(W, Q, H):
    error = W.double() - Q.double()
    return ((error @ H) * error).sum(1)


@pytest.mark.parametrize("name", oracle.GRIDS)
def test_levels_of_some_columns_are_those_of_all(name):
    kind = encoding(name)
    codes, grid = kind.unpack(oracle.random_bytes(name), 512)
    dense = grid.levels()
    values = dense.decode(codes)
    assert (grid.rows, grid.columns) == (5, 512)
    chosen = torch.randperm(512, generator=torch.Generator().manual_seed(0))[:128]
    for columns in (chosen, slice(100, 200), slice(None)):
        some = grid.levels(columns)
        assert some.scale.is_contiguous()
        assert torch.equal(some.scale, dense.scale[:, columns])
        assert torch.equal(some.decode(codes[:, columns]), values[:, columns])
        one = some.column(3)
        assert torch.equal(one.decode(codes[:, columns][:, 3]), values[:, columns][:, 3])
    group = grid.group_of
    assert group.dtype == torch.int64
    for columns in range(0, 512, 7):
        same = (group == group[columns]).nonzero().flatten()
        assert bool((dense.scale[:, same] == dense.scale[:, columns : columns + 1]).all())


@pytest.mark.parametrize("name", oracle.GRIDS)
def test_rows_are_selected_in_the_order_given(name):
    kind, packed = encoding(name), oracle.random_bytes(name)
    codes, grid = kind.unpack(packed, 512)
    rows = torch.tensor([3, 0, 3])
    np.testing.assert_array_equal(kind.pack(codes[rows], grid.select_rows(rows)), packed[rows.numpy()])


@pytest.mark.parametrize("name", oracle.GRIDS)
def test_in_float64_levels_round_to_the_nearest_too(name):
    kind, W = encoding(name), oracle.numbers((4, 512)).double()
    levels = kind.fit(W.float()).levels().to(torch.float64)
    codes = levels.round(W)
    assert codes.dtype == torch.int32
    error = (levels.decode(codes) - W).abs()
    for step in (-1, 1):
        other = (levels.decode((codes + step).clamp(0, levels.high)) - W).abs()
        assert bool((error <= other + 1e-15).all())


@pytest.mark.parametrize("table", [(-3.0, -1.0, 0.5, 2.0), (-0.7, -0.1, 0.3, 1.0), (-5000.0, 0.0, 5000.0)], ids=str)
def test_tables_of_any_numbers_are_rounded_to(table):
    values = torch.tensor(table)
    W = torch.linspace(-6, 6, 1001)[None] * values.max() / 2
    codes = Levels(torch.ones_like(W), len(table) - 1, table=values).round(W)
    distance = (W[0, :, None] - values).abs()
    assert torch.allclose(distance.gather(1, codes[0, :, None].long())[:, 0], distance.amin(1))


@pytest.mark.parametrize("name", oracle.GRIDS)
def test_a_refit_grid_is_never_worse_and_mostly_better(name):
    kind, W = encoding(name), oracle.numbers((12, 512))
    H, exact = hessian(512)
    start = kind.round(W, kind.fit(W, torch.diagonal(H)))
    W0, H0, codes0 = W.clone(), H.clone(), start.codes.clone()
    grid = kind.refit(start.codes, start.grid, W, H)
    assert torch.equal(W, W0)
    assert torch.equal(H, H0)
    assert torch.equal(start.codes, codes0)
    moved = dataclasses.replace(start, grid=grid)
    before, after = row_errors(W, start.decode(), exact), row_errors(W, moved.decode(), exact)
    assert bool((after <= before * (1 + 1e-5)).all())
    gain = 1 - float(after.sum() / before.sum())
    many = kind.block == 32 and "row" not in name  # six bits for a scale, or one for a row, leave little to move
    least = 0.0 if name == "mxfp4" else 0.02 if many else 0.0001  # powers of two leave even less
    assert gain > least
    again, stored = kind.unpack(moved.pack(), 512)
    assert torch.equal(stored.levels().decode(again), moved.decode())


def normal_equations(codes, grid, W, H):
    """The least error of each row over all real scales and offsets with the codes held; float64."""
    groups = grid.group_of
    levels = grid.levels()
    unit = dataclasses.replace(levels, scale=torch.ones_like(levels.scale), offset=None).decode(codes).double()
    least = []
    for q, w in zip(unit, W.double(), strict=True):
        P = torch.nn.functional.one_hot(groups).double() * q[:, None]
        if levels.offset is not None:
            P = torch.cat([P, torch.nn.functional.one_hot(groups).double()], dim=1)
        p = torch.linalg.lstsq(P.T @ H @ P, P.T @ H @ w, driver="gelsd").solution
        least.append((w - P @ p) @ H @ (w - P @ p))
    return torch.stack(least)


@pytest.mark.parametrize("name", ["q4_0", "iq4_nl", "q4_1", "q5_1"])
def test_refitting_comes_near_the_normal_equations(name):
    """Beside eight bits a float16 scale is coarse, so q8_0 is not among them."""
    kind, W = encoding(name), oracle.numbers((8, 256))
    H, exact = hessian(256)
    start = kind.round(W, kind.fit(W, torch.diagonal(H)))
    moved = dataclasses.replace(start, grid=kind.refit(start.codes, start.grid, W, H))
    least = normal_equations(start.codes, start.grid, W, exact)
    before, after = row_errors(W, start.decode(), exact), row_errors(W, moved.decode(), exact)
    assert bool((after >= least * (1 - 1e-6)).all())
    assert float((after - least).sum()) < 0.2 * float((before - least).sum())


@pytest.mark.parametrize("name", oracle.GRIDS)
def test_a_singular_hessian_and_zero_scales_are_no_trouble(name):
    kind, W = encoding(name), oracle.numbers((3, 512))
    W[0], W[1, :256] = 0, 0
    x = oracle.numbers((5, 512), seed=9, scale=1.0)
    x[:, 256:300] = 0
    H = x.T @ x / 5
    start = kind.round(W, kind.fit(W, torch.diagonal(H)))
    moved = dataclasses.replace(start, grid=kind.refit(start.codes, start.grid, W, H))
    before, after = (row_errors(W, q.decode(), H.double()) for q in (start, moved))
    assert bool(torch.isfinite(moved.decode()).all())
    assert bool((after <= before * (1 + 1e-4) + 1e-12).all())


@pytest.mark.parametrize("name", oracle.GRIDS)
def test_refit_works_in_runs_of_rows(name, monkeypatch):
    kind, W = encoding(name), oracle.numbers((7, 256))
    H, _ = hessian(256)
    start = kind.round(W, kind.fit(W))
    whole = dataclasses.replace(start, grid=kind.refit(start.codes, start.grid, W, H)).decode()
    monkeypatch.setattr("llmpack.encodings.tiles.SLAB", 1)
    parts = dataclasses.replace(start, grid=kind.refit(start.codes, start.grid, W, H)).decode()
    assert torch.allclose(whole, parts, rtol=1e-2, atol=1e-4)
