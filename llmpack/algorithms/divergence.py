"""How far the predictions of one model are from those of another, token by token, in nats.

``KL(p || q) = sum_v p_v (log p_v - log q_v)`` with p the original model and q the changed one. Logits come in
float32; every sum runs in float64, over a few tokens at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmpack.errors import NumericalError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

CHUNK = 64
"""Tokens whose logits are held in float64 at once (25 MB each at a vocabulary of 50k)."""

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
    _same_shape(logits_p, logits_q)
    parts = [_kl(p, q, at * CHUNK) for at, (p, q) in enumerate(zip(_chunks(logits_p), _chunks(logits_q), strict=True))]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def top1_agreement(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """[tokens] bool: whether both have the same most likely token (the first one, where several tie)."""
    _same_shape(logits_p, logits_q)
    return logits_p.argmax(-1) == logits_q.argmax(-1)


def surprise(logits: Tensor, targets: Tensor) -> Tensor:
    """``-log p(target)`` of every token: [tokens, vocabulary], [tokens] int64 to [tokens] float64, nats.

    The mean of it is the logarithm of the perplexity.
    """
    parts = []
    for chunk, wanted in zip(_chunks(logits), _chunks(targets), strict=True):
        wide = chunk.to(torch.float64)
        parts.append(torch.logsumexp(wide, -1) - wide.gather(-1, wanted[:, None])[:, 0])
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def compare(logits_p: Tensor, logits_q: Tensor, tokens: Tensor) -> Comparison:
    """Original against changed model on one stretch of text.

    logits  [tokens, vocabulary] float32; row t predicts what follows token t
    tokens  [tokens] int64, the text itself; the last row has no known target
    """
    excess = surprise(logits_q[:-1], tokens[1:]) - surprise(logits_p[:-1], tokens[1:])
    return Comparison(kl_divergence(logits_p, logits_q), top1_agreement(logits_p, logits_q), excess)


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


def _kl(p: Tensor, q: Tensor, first: int) -> Tensor:
    p, q = p.to(torch.float64), q.to(torch.float64)
    bad = ~(torch.isfinite(p).all(-1) & torch.isfinite(q).all(-1))
    if bool(bad.any()):
        raise NumericalError(f"logits of token {first + int(bad.nonzero()[0])} are not finite; the model is damaged")
    return Original(torch.log_softmax(p, -1)).kl(q)


def _chunks(tokens: Tensor) -> Sequence[Tensor]:
    return torch.split(tokens, CHUNK) if tokens.shape[0] else ()


def _same_shape(logits_p: Tensor, logits_q: Tensor) -> None:
    if logits_p.shape != logits_q.shape or logits_p.dim() != 2:
        raise ValueError(f"logits [tokens, vocabulary] differ in shape: {[*logits_p.shape]} and {[*logits_q.shape]}")


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
        _same_shape(self.p, logits)
        z = logits.to(torch.float32)
        z = z - z.amax(-1, keepdim=True)
        found = torch.logsumexp(z, -1).double() - (self.p * z).sum(-1, dtype=torch.float64) - self.entropy
        if not bool(torch.isfinite(found).all()):
            raise NumericalError("logits are not finite; the model is damaged")
        return found.clamp_min_(0)
