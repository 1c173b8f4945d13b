"""From tokens' losses to the loss: weights, divisor and sum.

Factors, sums and quotients of tokens are float64: beside a vocabulary that is free, and the loss is rounded once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixce_kernels.options import LossOptions


class Reduction(NamedTuple):
    """What is done to the tokens' losses [...]: multiplied by the weights, added up, divided."""

    name: str
    weights: Tensor | None  # [...] float64, 0 where ignored
    divisor: float | Tensor | None  # a number or a 0-d tensor, never 0

    @classmethod
    def of(cls, options: LossOptions, targets: Tensor, ignore_index: int) -> Reduction:
        """The reduction that the options ask for, which have passed `LossOptions.check_reduction`."""
        weights = None
        if options.token_weights is not None:
            # Whatever stands at an ignored token does not matter.
            weights = torch.where(targets != ignore_index, options.token_weights.detach().double(), 0.0)
        divisor = None
        if options.reduction == "mean":
            divisor = _divisor(targets, ignore_index, weights, options.num_items_in_batch)
        return cls(options.reduction, weights, divisor)

    def token_scale(self, targets: Tensor) -> Tensor:
        """The factor of each token's loss in the result, [...] float64 in targets' shape."""
        scale = torch.ones((), dtype=torch.float64, device=targets.device) if self.weights is None else self.weights
        return (scale if self.divisor is None else scale / self.divisor).expand(targets.shape)

    def apply(self, loss: Tensor) -> Tensor:
        """The loss, of tokens' losses [...]."""
        loss = loss if self.weights is None else loss * self.weights
        loss = loss if self.name == "none" else loss.sum(dtype=torch.float64)
        return loss if self.divisor is None else loss / self.divisor

    def sum_of(self, scaled_loss: Tensor) -> Tensor:
        """The loss, of tokens' losses [...] that were multiplied by `token_scale` before."""
        return scaled_loss if self.name == "none" else scaled_loss.sum()


def _divisor(
    targets: Tensor, ignore_index: int, weights: Tensor | None, num_items_in_batch: float | Tensor | None
) -> float | Tensor:
    """What "mean" divides by, a number or a 0-d tensor; 1 instead of 0."""
    if num_items_in_batch is None:
        if weights is None:
            return (targets != ignore_index).sum().clamp(min=1)
        divisor = weights.sum()
    elif isinstance(num_items_in_batch, Tensor):
        divisor = num_items_in_batch.detach().reshape(()).to(targets.device, torch.float64, non_blocking=True)
    else:
        return num_items_in_batch or 1.0
    return torch.where(divisor == 0, 1.0, divisor)
