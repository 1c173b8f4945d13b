"""The per-token statistics that come with the loss from the same pass."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MixCEStats(NamedTuple):
    """Detached statistics of each token, in targets' shape [...] and the loss's dtype, 0 where ignored.

    Attributes:
        nll: negative log-likelihood of the target in nats, after `logit_scale` and `softcap`, without smoothing.
        q: the model's probability of the target, exp(-nll).
        weight: eta + (1 - eta) * q, the token's weight in the mixture.
        lse: log-sum-exp of the scaled and capped logits, in nats.
        entropy: entropy of the model's distribution, in nats.
        correct: bool, whether the target is the first of the largest logits; False in a row with NaN.
    """

    nll: Tensor
    q: Tensor
    weight: Tensor
    lse: Tensor
    entropy: Tensor
    correct: Tensor

    @classmethod
    def of(cls, stats: Tensor, correct: Tensor) -> MixCEStats:
        """From the stacked statistics [5, ...] in the order of the attributes, and `correct` [...]."""
        nll, q, weight, lse, entropy = stats.unbind()
        return cls(nll, q, weight, lse, entropy, correct)
