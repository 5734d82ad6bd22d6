"""How far the predictions of one model are from those of another, token by token, in nats.

``KL(p || q) = sum_v p_v (log p_v - log q_v)`` with p the original model and q the changed one. Logits come in
float32; every sum runs in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmpack.errors import NumericalError
from llmpack.parallel import each, even

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from llmpack.algorithms import row_by_row
else:
    from llmpack.lazy import LazyModule

    np = LazyModule("numpy")
    torch = LazyModule("torch")
    row_by_row = LazyModule("llmpack.algorithms.row_by_row")

CHUNK = 64
"""Tokens that a thread compares at once."""

NORMAL_95 = 1.6448536269514722
"""One-sided 95 % point of the normal distribution."""


@dataclass(frozen=True)
class Comparison:
    """Two models on one stretch of text.

    kl      [tokens] float64, nats
    agree   [tokens] bool, both have the same most likely token
    excess  [targets] float64, how many nats more the changed model pays for the token that really follows
    """

    kl: Tensor
    agree: Tensor
    excess: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Comparison]) -> Comparison:
        """One stretch of text that was compared in parts."""
        columns = ([part.kl for part in parts], [part.agree for part in parts], [part.excess for part in parts])
        return cls(*(torch.cat(column) for column in columns))


@dataclass(frozen=True)
class Divergence:
    """Summary over all tokens compared.

    mean, stderr, p99, max   KL divergence in nats; `stderr` takes stretches of text as independent, or
                             tokens where there is only one stretch
    top1                     share of tokens with the same most likely token
    tokens                   how many were compared
    ppl_ratio                perplexity of the changed model over that of the original
    """

    mean: float
    stderr: float
    p99: float
    max: float
    top1: float
    tokens: int
    ppl_ratio: float

    @classmethod
    def of(cls, parts: Sequence[Comparison]) -> Divergence:
        """Summary of stretches of text. Raises ValueError when they hold no token."""
        if not any(part.kl.numel() for part in parts):
            raise ValueError("nothing was compared: there are no tokens")
        kl = torch.cat([part.kl for part in parts])
        excess = torch.cat([part.excess for part in parts])
        units = [part.kl for part in parts if part.kl.numel()]
        if len(units) == 1:
            units = list(torch.split(kl, 1))
        return cls(
            mean=float(kl.mean()),
            stderr=_stderr_of_mean(units),
            p99=float(torch.quantile(kl, 0.99)),
            max=float(kl.max()),
            top1=float(torch.cat([part.agree for part in parts]).to(torch.float64).mean()),
            tokens=kl.numel(),
            ppl_ratio=math.exp(float(excess.mean())) if excess.numel() else math.nan,
        )


def kl_divergence(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """``KL(p || q)`` of every token: [tokens, vocabulary] float32 twice to [tokens] float64, nats.

    Raises NumericalError for logits that are not finite.
    """
    return compare(logits_p, logits_q, torch.zeros(0, dtype=torch.int64)).kl


def compare(logits_p: Tensor, logits_q: Tensor, targets: Tensor) -> Comparison:
    """Original against changed model on one stretch of text.

    logits   [tokens, vocabulary] float32; row t predicts what follows token t
    targets  int64, what follows the first tokens: the last of a text has no successor

    Raises NumericalError for logits that are not finite.
    """
    if logits_p.shape != logits_q.shape or logits_p.dim() != 2:
        raise ValueError(f"logits [tokens, vocabulary] differ in shape: {[*logits_p.shape]} and {[*logits_q.shape]}")
    count = len(logits_p)
    kl, agree, excess = np.empty(count), np.empty(count, bool), np.empty(count)
    wanted = np.zeros(count, np.int64)
    wanted[: len(targets)] = targets.numpy()
    p, q = logits_p.detach().numpy(), logits_q.detach().numpy()

    def rows(part: slice) -> None:
        row_by_row.compare_rows(p[part], q[part], wanted[part], kl[part], agree[part], excess[part])

    if count:
        each(rows, even(count, CHUNK))
    bad = np.flatnonzero(~np.isfinite(kl))
    if len(bad):
        raise NumericalError(f"logits of token {bad[0]} are not finite; the model is damaged")
    np.maximum(kl, 0, out=kl)
    return Comparison(*map(torch.from_numpy, (kl, agree, excess[: len(targets)])))


@dataclass(frozen=True)
class Ratio:
    """Mean of one quantity over the mean of another on the same text, with a one-sided 95 % bound."""

    value: float
    stderr: float
    upper: float


def paired_ratio(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Ratio:
    """``mean(ours) / mean(theirs)`` over stretches of text that both were measured on.

    Stretches are taken as independent, tokens within one are not; both models saw the same text, so
    what is hard for both cancels. The error is the delta method's for a ratio of sums.
    """
    if len(ours) != len(theirs) or len(ours) < 2:
        raise ValueError(f"need the same two or more stretches of text, got {len(ours)} and {len(theirs)}")
    top = torch.stack([part.to(torch.float64).sum() for part in ours])
    bottom = torch.stack([part.to(torch.float64).sum() for part in theirs])
    count = len(ours)
    value = float(top.sum() / bottom.sum())
    residual = top - value * bottom
    stderr = math.sqrt(count / (count - 1) * float((residual**2).sum())) / float(bottom.sum())
    return Ratio(value, stderr, value + NORMAL_95 * stderr)


def _stderr_of_mean(units: Sequence[Tensor]) -> float:
    """Of the mean over all tokens, taking `units` as independent; 0 for a single unit."""
    count = len(units)
    if count < 2:
        return 0.0
    sums = torch.stack([unit.sum() for unit in units])
    sizes = torch.tensor([unit.numel() for unit in units], dtype=torch.float64)
    residual = sums - sums.sum() / sizes.sum() * sizes
    return math.sqrt(count / (count - 1) * float((residual**2).sum())) / float(sizes.sum())


class Original:
    """Predictions of one model that those of a few others are compared with exactly.

    log_p  [tokens, vocabulary] float64
    """

    def __init__(self, log_p: Tensor) -> None:
        self._log_p, self._p = log_p, log_p.exp()

    def kl(self, logits: Tensor) -> Tensor:
        """``KL(p || q)`` [tokens] float64 of others' logits [tokens, vocabulary]; not finite where these are not."""
        return (self._p * (self._log_p - torch.log_softmax(logits.to(torch.float64), -1))).sum(-1).clamp_min_(0)


@dataclass(frozen=True)
class Wanted:
    """Predictions of one model that those of many others are compared with.

    p        [tokens, vocabulary] float32 probabilities
    entropy  [tokens] float64, nats
    """

    p: Tensor
    entropy: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Wanted:
        """From logits [tokens, vocabulary] float32."""
        log_p = torch.log_softmax(logits.to(torch.float32), -1)
        p = log_p.exp()
        return cls(p, -(p * log_p).sum(-1, dtype=torch.float64))

    def kl(self, logits: Tensor) -> Tensor:
        """``KL(p || q)`` [tokens] float64 of others' logits: ``log sum exp z - p . z - H(p)``, z shifted to end at 0.

        Three passes in float32 and no second distribution, so a ranking of many models is affordable; good to some
        1e-5 nats. `kl_divergence` is exact. Raises NumericalError for logits that are not finite.
        """
        if self.p.shape != logits.shape:
            raise ValueError(f"logits [tokens, vocabulary] differ in shape: {[*self.p.shape]} and {[*logits.shape]}")
        z = logits.to(torch.float32)
        z = z - z.amax(-1, keepdim=True)
        found = torch.logsumexp(z, -1).double() - (self.p * z).sum(-1, dtype=torch.float64) - self.entropy
        if not bool(torch.isfinite(found).all()):
            raise NumericalError("logits are not finite; the model is damaged")
        return found.clamp_min_(0)
