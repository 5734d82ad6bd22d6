"""Block tuning against a slow float64 twin, and what it leaves alone."""

import pytest
import torch
from torch import nn

from llmpack.algorithms.tuning import MovableNorm, MovableScales, Tuning, output_error
from llmpack.encodings import encoding

COLUMNS, INNER = 256, 64


class Block(nn.Module):
    """A norm and two matrices, in float64."""

    def __init__(self, norm, up, down):
        super().__init__()
        self.norm, self.up, self.down = (nn.Parameter(p.double(), requires_grad=False) for p in (norm, up, down))

    def forward(self, x):
        return block(x, self.norm, self.up, self.down)


def block(x, norm, up, down):
    normed = x / x.square().mean(-1, keepdim=True).sqrt() * norm
    return x + torch.tanh(normed @ up.T) @ down.T


def setting(up, down):
    g = torch.Generator().manual_seed(0)
    norm = torch.rand(COLUMNS, generator=g) + 0.5
    matrices = [torch.randn(INNER, COLUMNS, generator=g) / 16, torch.randn(COLUMNS, INNER, generator=g) / 8]
    kinds = [encoding(up), encoding(down)]
    rounded = [kind.round(W, kind.fit(W)) for kind, W in zip(kinds, matrices, strict=True)]
    x = torch.randn(3, 40, COLUMNS, generator=g).double()
    wanted = block(x, norm.double(), *(W.double() for W in matrices))
    return norm, rounded, x, wanted


def twin(norm, rounded, x, wanted, rate, steps):
    """Units of both grids and the norm after some steps of Adam, everything written out."""
    starts, strides = [norm.double()], [norm.double().abs().mean().expand_as(norm)]
    for one in rounded:
        grid = one.grid
        if hasattr(grid, "factors"):
            halves = [grid.d] if grid.dmin is None else [grid.d, grid.dmin]
            strides += [half.double().abs() for half in halves]
        else:
            halves = [grid.d] if grid.m is None else [grid.d, grid.m]
            strides += [grid.d.double().abs() for _ in halves]
        starts += [half.double() for half in halves]

    def matrix(one, units):
        rows, columns = one.codes.shape
        W = torch.empty(rows, columns, dtype=torch.float64)
        table = one.encoding.steps.table
        for j in range(columns):
            group = j // one.grid.group
            c = one.codes[:, j].long()
            q = (torch.tensor(table)[c] if table else c + one.encoding.steps.low).double()
            if hasattr(one.grid, "factors"):
                s = j // 256
                W[:, j] = units[0][:, s] * one.grid.factors[:, group] * q
                if len(units) > 1:
                    W[:, j] = W[:, j].clone() - units[1][:, s] * one.grid.minima[:, group]
            else:
                W[:, j] = units[0][:, group] * q + (units[1][:, group] if len(units) > 1 else 0)
        return W

    counts = [len(one.grid.units) for one in rounded]
    moves = [torch.zeros_like(one) for one in starts]
    first, second = ([torch.zeros_like(m) for m in moves] for _ in range(2))
    losses = []
    for t in range(steps):
        leaves = [m.clone().requires_grad_() for m in moves]
        now = [a + b * m for a, b, m in zip(starts, strides, leaves, strict=True)]
        up = matrix(rounded[0], now[1 : 1 + counts[0]])
        down = matrix(rounded[1], now[1 + counts[0] :])
        y = block(x, now[0], up, down)
        loss = sum(((y - wanted) ** 2).sum(-1).flatten() / (wanted**2).sum(-1).flatten()) / wanted[..., 0].numel()
        losses.append(float(loss.detach()))
        for i, g in enumerate(torch.autograd.grad(loss, leaves)):
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g**2
            mean, square = first[i] / (1 - 0.9 ** (t + 1)), second[i] / (1 - 0.999 ** (t + 1))
            moves[i] = moves[i] - rate * (1 - t / steps) * mean / (square.sqrt() + 1e-8)
    return losses, [a + b * m for a, b, m in zip(starts, strides, moves, strict=True)]


@pytest.mark.parametrize("names", [("q4_1", "q4_0"), ("iq4_nl", "q5_1"), ("q2_k", "q4_0"), ("q3_k", "iq4_nl")])
def test_steps_are_those_of_the_slow_twin(names):
    norm, rounded, x, wanted = setting(*names)
    ours = Block(norm, *(one.decode() for one in rounded))
    scales = [MovableScales(ours.up, rounded[0]), MovableScales(ours.down, rounded[1])]
    moving = MovableNorm(ours.norm)
    descent = Tuning([*scales, moving], rate=2e-3, steps=3)
    losses = [descent.step(lambda: output_error(ours(x), wanted)) for _ in range(3)]
    expected, units = twin(norm, rounded, x, wanted, 2e-3, 3)
    assert losses == pytest.approx(expected, rel=1e-6)  # the first forward pass has weights decoded in float32
    assert losses[2] < losses[0]
    found = [ours.norm, *scales[0].units(), *scales[1].units()]
    for a, b in zip(found, units, strict=True):
        assert torch.allclose(a.detach(), b, rtol=0, atol=1e-6 * float(b.abs().max()))
    assert not any(p.requires_grad or p.grad is not None for p in ours.parameters())


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "iq4_nl", "q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs"])
def test_moved_grids_are_what_the_file_can_hold(name):
    kind = encoding(name)
    W = torch.randn(24, 512, generator=torch.Generator().manual_seed(1)) / 16
    W[3, :256] = 0
    rounded = kind.round(W, kind.fit(W))
    weight = nn.Parameter(rounded.decode(), requires_grad=False)
    scales = MovableScales(weight, rounded)
    descent = Tuning([scales], rate=0.01, steps=4)
    for _ in range(4):
        descent.step(lambda: output_error(weight, 1.01 * W + 1e-3))
    grid = scales.grid()
    codes, again = kind.unpack(kind.pack(rounded.codes, grid), 512)
    assert torch.equal(codes, rounded.codes.to(torch.int32))
    assert torch.equal(again.levels().decode(codes), grid.levels().decode(codes))
    assert torch.allclose(grid.levels().decode(codes), weight, rtol=0.003, atol=5e-4)
    assert not torch.equal(again.levels().decode(codes), rounded.decode())


def test_tokens_count_the_same_whatever_their_length():
    wanted = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))
    longer = wanted * torch.tensor([1.0, 100, 1, 3, 1])[:, None]
    assert float(output_error(1.1 * wanted, wanted)) == pytest.approx(0.01, rel=1e-5)
    assert float(output_error(1.1 * longer, longer)) == pytest.approx(0.01, rel=1e-5)


def test_scales_that_are_powers_of_two_cannot_move_by_a_little():
    kind = encoding("mxfp4")
    W = torch.randn(2, 32, generator=torch.Generator().manual_seed(4))
    with pytest.raises(ValueError, match="mxfp4"):
        MovableScales(nn.Parameter(W), kind.round(W, kind.fit(W)))
