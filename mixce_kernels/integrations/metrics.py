"""`TokenMetrics`: the statistics that come with the loss, averaged over tokens, for a trainer's log."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from mixce_kernels.stats import MixCEStats


class TokenMetrics:
    """Means over the valid tokens of all batches since they were last read.

    The sums stay on the device in float64: adding a batch does not synchronise, reading does.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # [6]: nll, q, weight, entropy, correct, tokens

    def update(
        self,
        stats: MixCEStats,  # each [...]
        targets: Tensor,  # [...]
        ignore_index: int = -100,
    ) -> None:
        """Adds the tokens of a batch, whose statistics are 0 where the target is `ignore_index`."""
        valid = targets != ignore_index
        columns = (stats.nll, stats.q, stats.weight, stats.entropy, stats.correct & valid, valid)
        sums = torch.stack([column.sum(dtype=torch.float64) for column in columns])
        self._sums = sums if self._sums is None else self._sums.to(sums.device) + sums

    def compute(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """The means, over the ranks of `group` too where one is given; starts anew.

        Returns:
            nll (nats), perplexity (its exponential), q (the model's probability of the target), weight (the token's
            weight in the mixture, eta + (1 - eta) * f), entropy (nats), accuracy (share of tokens whose target has the
            largest logit) and tokens (their number). An empty dictionary where there was no valid token.
        """
        sums, self._sums = self._sums, None
        if group is not None:
            # A rank without a batch takes part: the others wait for it.
            device = torch.device("cpu") if dist.get_backend(group) == "gloo" else torch.device("cuda")
            sums = torch.zeros(6, dtype=torch.float64, device=device) if sums is None else sums.to(device)
            dist.all_reduce(sums, group=group)
        if sums is None:
            return {}
        *totals, tokens = sums.tolist()
        if tokens == 0:
            return {}
        nll, q, weight, entropy, accuracy = (total / tokens for total in totals)
        perplexity = math.exp(nll) if nll < 700 else math.inf
        return {
            "nll": nll,
            "perplexity": perplexity,
            "q": q,
            "weight": weight,
            "entropy": entropy,
            "accuracy": accuracy,
            "tokens": tokens,
        }
