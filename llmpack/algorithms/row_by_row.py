"""Two predictions of each token compared without a copy of either (numba)."""

from __future__ import annotations

import math

import numpy as np

from llmpack.compiled import Array, compiled


@compiled
def _likeliest(row: Array) -> int:
    """Where the largest number stands, the first one where several tie."""
    at, top = 0, row[0]
    for v in range(1, len(row)):
        if row[v] > top:
            at, top = v, row[v]
    return at


@compiled
def compare_rows(p: Array, q: Array, targets: Array, kl: Array, agree: Array, excess: Array) -> None:
    """Logits of an original and of a changed model, [tokens, vocabulary] each; sums run in float64.

    targets  [tokens]: the token that follows each
    kl       filled: ``KL(p || q) = log sum exp q - log sum exp p + sum_v p_v (logit_p - logit_q)``, nats; not finite
             where logits are not
    agree    filled: whether both have the same most likely token
    excess   filled: ``log p(target) - log q(target)``, nats
    """
    for t in range(len(p)):
        at_p, at_q = _likeliest(p[t]), _likeliest(q[t])
        top_p, top_q = np.float64(p[t, at_p]), np.float64(q[t, at_q])
        sum_p, sum_q, gap = 0.0, 0.0, 0.0
        for v in range(p.shape[1]):
            a, b = np.float64(p[t, v]) - top_p, np.float64(q[t, v]) - top_q
            weight = math.exp(a)
            sum_p += weight
            sum_q += math.exp(b)
            gap += weight * (a - b)
        longer = math.log(sum_q) - math.log(sum_p)
        kl[t] = longer + gap / sum_p
        agree[t] = at_p == at_q
        last = targets[t]
        excess[t] = longer + (np.float64(p[t, last]) - top_p) - (np.float64(q[t, last]) - top_q)
