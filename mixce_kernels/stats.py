"""The per-token statistics that come with the loss from the same pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenMeans(NamedTuple):
    """Means over valid tokens: 0-d tensors of the statistics' dtype, on their device; NaN where no token is valid.

    Attributes:
        nll: negative log-likelihood of the targets, in nats: the plain cross-entropy, comparable between etas.
        perplexity: exp(nll).
        q: the model's probability of the target.
        weight: the token's weight in the mixture.
        lse: log-sum-exp of the logits, in nats.
        entropy: of the model's distribution, in nats.
        collision: the probability that two draws from the model are the same token.
        accuracy: the share of tokens whose target is the first of the largest logits.
    """

    nll: Tensor
    perplexity: Tensor
    q: Tensor
    weight: Tensor
    lse: Tensor
    entropy: Tensor
    collision: Tensor
    accuracy: Tensor


class MixCEStats(NamedTuple):
    """Detached statistics of each token, in targets' shape [...] and the loss's dtype, 0 where ignored.

    `means()` averages them over the tokens that are not ignored, which `stats.nll.mean()` would count as 0.

    Attributes:
        nll: negative log-likelihood of the target in nats, after `logit_scale` and `softcap`, without smoothing.
        q: the model's probability of the target, exp(-nll).
        weight: eta + (1 - eta) * f, the token's weight in the mixture; f is q unless another weighting was asked for.
        lse: log-sum-exp of the scaled and capped logits, in nats.
        entropy: entropy of the model's distribution, in nats.
        collision: sum_j p_j^2, the probability that two draws from the model are the same token.
        correct: bool, whether the target is the first of the largest logits; False in a row with NaN.
    """

    nll: Tensor
    q: Tensor
    weight: Tensor
    lse: Tensor
    entropy: Tensor
    collision: Tensor
    correct: Tensor

    @property
    def valid(self) -> Tensor:
        """Which tokens are not ignored: [...] bool."""
        # A token has q = 1 where its nll is 0, and an ignored one 0 for both.
        return (self.q != 0) | (self.nll != 0)

    def means(self) -> TokenMeans:
        """The means over the tokens that are not ignored, from float64 sums; does not synchronise with a GPU."""
        sums = [column.sum(dtype=torch.float64) for column in (*self, self.valid)]
        nll, *others = (total / sums[-1] for total in sums[:-1])
        return TokenMeans(*(mean.to(self.nll.dtype) for mean in (nll, nll.exp(), *others)))

    @classmethod
    def of(cls, stats: Tensor, correct: Tensor) -> MixCEStats:
        """From the stacked statistics [STATS_WIDTH, ...] in the order of the attributes, and `correct` [...]."""
        nll, q, weight, lse, entropy, collision = stats.unbind()
        return cls(nll, q, weight, lse, entropy, collision, correct)
