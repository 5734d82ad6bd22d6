"""Scales and norms adjusted by gradient descent while codes stay.

Rounding looks at one matrix at a time. What counts is what the whole block puts out, and that is smooth in everything
real that is left: the scales of the groups (of the super-blocks, in k-quants) and the weights of the norms. A few steps
of Adam on them let all parts of a block make up for each other. EfficientQAT (Chen et al. 2024, arXiv:2407.11062)
trains scales so, end to end; here codes are those of GPTQ, and the measure is the block's own output.

Moves are relative, so that one learning rate serves all: a scale moves in units of itself, a minimum in units of its
scale, the weights of a norm in units of their mean size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from llmpack.encodings.encoding import Quantized
from llmpack.encodings.grids import ScaleGrid
from llmpack.encodings.tiles import SLAB, runs

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")


def output_error(output: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of ``|y - t|^2 / |t|^2``, for hidden states [..., D].

    Each token counts the same: the norm that reads them next divides by their size, and a few tokens of most models
    have hidden states a hundred times as long as all others.
    """
    energy = wanted.square().sum(-1)
    least = torch.finfo(energy.dtype).tiny
    return ((output - wanted).square().sum(-1) / energy.clamp(min=least)).mean()


class Movable(ABC):
    """A parameter of a block as a function of a few moves, all 0 at the start.

    weight  the parameter that the block runs with
    moves   leaves of the descent, in units of what is natural for each number
    """

    def __init__(self, weight: nn.Parameter, strides: Sequence[Tensor]) -> None:
        self.weight = weight
        self.moves = [torch.zeros_like(stride, dtype=weight.dtype).requires_grad_() for stride in strides]

    @abstractmethod
    def write(self) -> None:
        """Let the block run with the present moves."""

    @abstractmethod
    def receive(self, gradient: Tensor) -> None:
        """Add to the gradients by the moves, from that by the parameter."""


class MovableNorm(Movable):
    """The weights of a norm."""

    def __init__(self, weight: nn.Parameter) -> None:
        size = float(weight.detach().abs().mean())
        self._start, self._stride = weight.detach().clone(), size if size > 0 else 1.0
        super().__init__(weight, (weight.detach(),))

    def write(self) -> None:
        """Put the moved weights into the block."""
        with torch.no_grad():
            self.weight.copy_(self._start + self._stride * self.moves[0])

    def receive(self, gradient: Tensor) -> None:
        """Element by element."""
        scaled = self._stride * gradient
        self.moves[0].grad = scaled if self.moves[0].grad is None else self.moves[0].grad + scaled


class MovableScales(Movable):
    """The scales of a rounded matrix. Raises ValueError for a grid without any that may move."""

    def __init__(self, weight: nn.Parameter, rounded: Quantized) -> None:
        grid = rounded.grid
        if not isinstance(grid, ScaleGrid) or not grid.units:
            raise ValueError(f"nothing of a grid of {rounded.encoding.name} can move by a little")
        self._codes, self._grid = rounded.codes, grid
        self._units = [unit.to(weight.dtype) for unit in grid.units]
        self._strides = [stride.to(weight.dtype) for stride in grid.strides]
        super().__init__(weight, self._strides)

    def units(self) -> tuple[Tensor, ...]:
        """The units of the grid as moved, not rounded; gradients pass to the moves."""
        return tuple(u + s * m for u, s, m in zip(self._units, self._strides, self.moves, strict=True))

    def grid(self) -> ScaleGrid:
        """The grid as moved, in the precision of the file."""
        with torch.no_grad():
            return self._grid.moved(tuple(unit.to(torch.float32) for unit in self.units()))

    def write(self) -> None:
        """Decode the codes on the moved scales into the block, some rows at a time."""
        with torch.no_grad():
            scales, offsets = self._grid.spread(self.units())
            for run in self._runs():
                values = self._multiples(run).mul_(scales[run, :, None])
                if offsets is not None:
                    values += offsets[run, :, None]
                self.weight[run] = values.flatten(1)

    def receive(self, gradient: Tensor) -> None:
        """Sums over groups, and from there to the units."""
        shape = self._grid.scales.shape
        by_scale = gradient.new_empty(shape)
        by_offset = None if self._grid.offsets is None else gradient.new_empty(shape)
        for run in self._runs():
            multiples = self._multiples(run)
            some = gradient[run].reshape(multiples.shape)
            by_scale[run] = multiples.mul_(some).sum(-1)
            if by_offset is not None:
                by_offset[run] = some.sum(-1)
        with torch.enable_grad():
            scales, offsets = self._grid.spread(self.units())
        ends = [scales] if offsets is None or by_offset is None else [scales, offsets]
        given = [by_scale] if offsets is None or by_offset is None else [by_scale, by_offset]
        torch.autograd.backward(ends, given)

    def _runs(self) -> list[slice]:
        return list(runs(self._codes.shape[0], self._codes.shape[1], SLAB))

    def _multiples(self, run: slice) -> Tensor:
        """[rows, groups, group] what the codes of some rows stand for in units of their scale."""
        some = self._grid.select_rows(run).multiples(self._codes[run]).to(self.weight.dtype)
        return some.reshape(len(some), -1, self._grid.group)


class Tuning:
    """A descent of `steps` steps of Adam on what may move; the learning rate falls to 0 along a line.

    rate  of the first step, as a share of a scale
    """

    def __init__(self, movables: Sequence[Movable], *, rate: float, steps: int) -> None:
        self._movables, self._rate, self._steps, self._done = movables, rate, steps, 0
        self._adam = torch.optim.Adam([move for one in movables for move in one.moves], lr=rate)

    def step(self, loss: Callable[[], Tensor]) -> float:
        """Move once against the gradient of a loss, given as what computes it; the loss before the move."""
        self._adam.zero_grad()
        for group in self._adam.param_groups:
            group["lr"] = self._rate * (1 - self._done / self._steps)
        with ExitStack() as watched:
            for one in self._movables:
                one.weight.requires_grad_(True)
                hook = one.weight.register_post_accumulate_grad_hook(partial(_pass_on, one))  # type: ignore[no-untyped-call]
                watched.callback(hook.remove)
                watched.callback(one.weight.requires_grad_, False)
            value = loss()
            value.backward()  # type: ignore[no-untyped-call]
        self._adam.step()
        self._done += 1
        for one in self._movables:
            one.write()
        return float(value.detach())


def _pass_on(movable: Movable, weight: Tensor) -> None:
    """Reduce a gradient as soon as it is whole, so that one of them is in memory at a time."""
    if weight.grad is not None:
        movable.receive(weight.grad)
        weight.grad = None
