"""Int groups in activation order: who shares a scale, their bytes, and what they decode to."""

import numpy as np
import pytest
import torch

from llmpack.encodings import encoding
from llmpack.encodings.conversion import block_encoding
from llmpack.encodings.names import INT_NAMES, ORDERED_NAMES, int_options
from llmpack.encodings.tiles import SLAB
from tests.encodings import oracle

SOME = ("int4_g32_act", "int3_g64_asym_act", "int8_g128_act", "int2_g32_asym_act")


def neighbours(name):
    return encoding(name.removesuffix("_act"))


def slow_groups(importance, group):
    """The group of each column by its rank among all: how many columns go before it."""
    values = importance.double().tolist()
    ranks = [sum(b > a or (b == a and j < i) for j, b in enumerate(values)) for i, a in enumerate(values)]
    return [rank // group for rank in ranks]


def test_names():
    assert len(ORDERED_NAMES) == 4 * 3 * 2
    assert {name for name in INT_NAMES if int_options(name).act_order} == set(ORDERED_NAMES)
    for name in ORDERED_NAMES:
        assert int_options(name)[:3] == int_options(name.removesuffix("_act"))[:3]
        assert (encoding(name).name, encoding(name).bits) == (name, neighbours(name).bits)
        assert block_encoding(name) is None
    with pytest.raises(ValueError, match="int4_row_act is no encoding of int groups"):
        int_options("int4_row_act")


@pytest.mark.parametrize("name", SOME)
def test_columns_with_inputs_alike_in_size_share_a_scale(name):
    W, importance = oracle.numbers((5, 256), "shifted"), oracle.importance_of(256)
    importance[7] = importance[200]  # a tie: the one to the left goes first
    grid = encoding(name).fit(W, importance)
    group = int_options(name).group
    groups = torch.tensor(slow_groups(importance, group))
    assert torch.equal(grid.group_of, groups)
    levels = grid.levels()
    for one in range(256 // group):
        own = groups == one
        alone = neighbours(name).fit(W[:, own], importance[own]).levels()
        assert torch.equal(levels.scale[:, own], alone.scale)
        assert torch.equal(*(torch.as_tensor(z).expand(5, group) for z in (levels.column(own).zero, alone.zero)))
    some = torch.tensor([250, 3, 3, 17])
    assert torch.equal(grid.levels(some).scale, levels.scale[:, some])
    assert torch.equal(grid.select_rows(torch.tensor([4, 0])).levels().scale, levels.scale[[4, 0]])


@pytest.mark.parametrize("name", SOME)
def test_bytes_come_back(name):
    kind, W = encoding(name), oracle.numbers((4, 384), "heavy")
    rounded = kind.round(W, kind.fit(W, oracle.importance_of(384)))
    packed = rounded.pack()
    assert packed.shape == (4, kind.row_bytes(384)) == (4, neighbours(name).row_bytes(384) + 384)
    codes, grid = kind.unpack(packed, 384)
    assert torch.equal(codes, rounded.codes)
    assert torch.equal(grid.group_of, rounded.grid.group_of)
    np.testing.assert_array_equal(kind.pack(codes, grid), packed)
    np.testing.assert_array_equal(kind.encode(W, oracle.importance_of(384)), packed)
    levels = grid.levels()
    assert torch.equal(kind.decode(packed, 384), levels.scale * (codes - levels.zero))
    assert torch.equal(kind.decode(packed[[2, 0]], 384), kind.decode(packed, 384)[[2, 0]])


def test_more_groups_than_a_byte_counts():
    kind, columns = encoding("int4_g32_act"), 32 * 300
    W, importance = oracle.numbers((2, columns)), oracle.importance_of(columns)
    packed = kind.encode(W, importance)
    assert packed.shape[1] == neighbours("int4_g32_act").row_bytes(columns) + 2 * columns
    assert kind.unpack(packed, columns)[1].group_of.tolist() == slow_groups(importance, 32)


def test_without_importance_neighbours_share_a_scale():
    W = oracle.numbers((3, 128))
    kind = encoding("int4_g32_act")
    assert torch.equal(
        kind.decode(kind.encode(W), 128), neighbours(kind.name).decode(neighbours(kind.name).encode(W), 128)
    )


def test_rows_encoded_in_runs_have_the_same_groups():
    columns = 1024
    W, importance = oracle.numbers((SLAB // columns + 3, columns)), oracle.importance_of(columns)
    kind = encoding("int4_g128_act")
    packed = kind.encode(W, importance)
    np.testing.assert_array_equal(packed, kind.round(W, kind.fit(W, importance)).pack())
    assert torch.equal(kind.decode(packed, columns)[-1:], kind.decode(packed[-1:], columns))


@pytest.mark.parametrize("name", SOME)
def test_scales_fitted_again_lower_the_error_of_every_row(name):
    kind, W = encoding(name), oracle.numbers((6, 256), "heavy")
    x = oracle.numbers((900, 256), seed=4) * oracle.importance_of(256).sqrt()
    H = x.T @ x / 900
    start = kind.round(W, kind.fit(W, torch.diagonal(H)))
    moved = kind.refit(start.codes, start.grid, W, H)
    assert torch.equal(moved.group_of, start.grid.group_of)
    before, after = (
        torch.einsum("ri,ij,rj->r", *(e := (W - grid.levels().decode(start.codes)).double(), H.double(), e))
        for grid in (start.grid, moved)
    )
    assert bool((after <= before).all())
    assert float(after.sum()) < float(before.sum())


def test_rows_that_disagree_are_refused():
    kind, W = encoding("int4_g32_act"), oracle.numbers((3, 64))
    packed = kind.encode(W, oracle.importance_of(64))
    packed[1, -1] ^= 1
    with pytest.raises(ValueError, match="rows of int4_g32_act disagree about the group of a column"):
        kind.unpack(packed, 64)
    packed[:, -1] = packed[0, -1] ^ 1
    with pytest.raises(ValueError, match="a group is not full"):
        kind.unpack(packed, 64)
    with pytest.raises(ValueError, match="not fitted for int4_g32_act"):
        kind.pack(*neighbours("int4_g32_act").unpack(neighbours("int4_g32_act").encode(W), 64))
