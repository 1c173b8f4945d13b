"""The results of a forward, as the kernels write them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixce_kernels.options import accumulate_dtype

# Numbers of a token: m, s, a, c, t, from which its gradient is made, and nll, q, weight, lse, entropy.
STATE_WIDTH = 5
STATS_WIDTH = 5


class Results(NamedTuple):
    """Loss, state and statistics of tokens [...]; statistics and `correct` are [0] where not asked for."""

    loss: Tensor  # [...]
    state: Tensor  # [STATE_WIDTH, ...]
    stats: Tensor  # [STATS_WIDTH, ...]
    correct: Tensor  # [...] bool

    @property
    def with_stats(self) -> bool:
        """Whether statistics are asked for."""
        return self.stats.shape[0] > 0


def empty_results(logits: Tensor, targets: Tensor, with_stats: bool) -> Results:
    """Memory for the results of tokens `targets` [...], in the type of arithmetic of logits."""
    shape, dtype = targets.shape, accumulate_dtype(logits.dtype)
    return Results(
        loss=logits.new_empty(shape, dtype=dtype),
        state=logits.new_empty((STATE_WIDTH, *shape), dtype=dtype),
        stats=logits.new_empty((STATS_WIDTH, *shape) if with_stats else (0,), dtype=dtype),
        correct=logits.new_empty(shape if with_stats else (0,), dtype=torch.bool),
    )
