"""The results of a forward, as the kernels write them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixce_kernels.options import accumulate_dtype
from mixce_kernels.reduction import Reduction

# Numbers of a token: m, s, a, c, t, from which its gradient is made, and nll, q, weight, lse, entropy, collision. For
# the entropy's gradient two more: u, the mean of z - m over the model's distribution, and q * (z_y - m - u).
STATE_WIDTH = 5
STATS_WIDTH = 6
ENTROPY_STATE_WIDTH = 2


class Results(NamedTuple):
    """The loss, and what comes with it: None for what was not asked for."""

    loss: Tensor  # [], or [...] where nothing is added up
    token_scale: Tensor | None  # float64 [], with weights [...]: a token's factor in the loss, for a gradient; None: 1
    state: Tensor | None  # [STATE_WIDTH, ...], for a gradient
    stats: Tensor | None  # [STATS_WIDTH, ...]
    correct: Tensor | None  # [...] bool, with statistics
    losses: Tensor | None  # [...], the tokens' own, which may be the loss; None: the backend's affair
    entropy_state: Tensor | None = None  # [ENTROPY_STATE_WIDTH, ...], for a gradient of the entropy; with statistics

    def with_losses(self, targets: Tensor) -> Results:
        """With memory for the losses of tokens `targets` [...]."""
        return self if self.losses is not None else self._replace(losses=self.loss.new_empty(targets.shape))

    def returned(self) -> tuple[Tensor | None, ...]:
        """What an operator of a loss returns."""
        return self.loss, self.token_scale, self.state, self.stats, self.correct


class EntropyGrad(NamedTuple):
    """What a gradient of the tokens' entropies is made from."""

    upstream: Tensor  # [], or [...] of any strides
    state: Tensor  # [ENTROPY_STATE_WIDTH, ...]


def empty_results(
    logits: Tensor,
    targets: Tensor,
    reduction: Reduction,
    *,
    with_state: bool,
    with_stats: bool,
    with_entropy_state: bool = False,
) -> Results:
    """Memory for the results of tokens `targets` [...], in the type of arithmetic of logits."""
    shape, dtype = targets.shape, accumulate_dtype(logits.dtype)
    loss = logits.new_empty(() if reduction.sums else shape, dtype=dtype)
    return Results(
        loss,
        empty_token_scale(targets, reduction) if with_state else None,
        logits.new_empty((STATE_WIDTH, *shape), dtype=dtype) if with_state else None,
        logits.new_empty((STATS_WIDTH, *shape), dtype=dtype) if with_stats else None,
        logits.new_empty(shape, dtype=torch.bool) if with_stats else None,
        loss if reduction.is_identity else None,
        logits.new_empty((ENTROPY_STATE_WIDTH, *shape), dtype=dtype) if with_entropy_state else None,
    )


def empty_token_scale(targets: Tensor, reduction: Reduction) -> Tensor | None:
    """Memory for a token's factor in the loss, None where it is 1."""
    if not reduction.scales_tokens:
        return None
    return targets.new_empty(() if reduction.weights is None else targets.shape, dtype=torch.float64)
