"""Learning from another model's predictions when only its likeliest tokens are kept: forward KL with the tail as one
token.

For each position the teacher's k largest log-probabilities are kept. What is left of its probability is compared, as
if it were one token, with what is left of the student's: without that, a student that puts too much on those k tokens
would pay nothing for it. With k the whole vocabulary this is ``KL(p || q)`` itself.

Hidden states may be compared beside: a student that is led where its teacher was has more to go by than tokens say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")

SMALLEST = 1e-7
"""Least probability of the tail that is told from none: float32 sums of the others are no more exact."""


def likeliest(logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Ids [tokens, k] int32 and log-probabilities [tokens, k] float32 of logits [tokens, vocabulary]."""
    log_p = torch.log_softmax(logits.to(torch.float32) / temperature, -1)
    values, ids = torch.topk(log_p, min(k, logits.shape[-1]), dim=-1)
    return ids.to(torch.int32), values


def tail_kl(logits: Tensor, ids: Tensor, log_p: Tensor, temperature: float = 1.0) -> Tensor:
    """[tokens] float32, nats: KL divergence of the teacher's kept tokens and tail to those of a student.

    logits  [tokens, vocabulary] of the student, differentiable
    ids     [tokens, k], log_p [tokens, k]: of the teacher, at the same temperature

    Times the temperature squared, so that gradients keep their size (Hinton et al. 2015, arXiv:1503.02531).
    """
    log_q = torch.log_softmax(logits.to(torch.float32) / temperature, -1).gather(-1, ids.to(torch.int64))
    log_p = log_p.to(torch.float32)
    p = log_p.exp()
    rest_p = (1 - p.sum(-1)).clamp_min(0)
    rest_q = (1 - log_q.exp().sum(-1)).clamp_min(SMALLEST)
    tail = torch.where(rest_p > SMALLEST, rest_p * (rest_p.clamp_min(SMALLEST).log() - rest_q.log()), 0.0)
    found: Tensor = ((p * (log_p - log_q)).sum(-1) + tail) * temperature**2
    return found


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """[...] float32: squared distance of hidden states [..., D] from the teacher's, over the teacher's squared size."""
    wanted = teacher.to(torch.float32)
    size = wanted.pow(2).sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    found: Tensor = (student.to(torch.float32) - wanted).pow(2).sum(-1) / size
    return found
