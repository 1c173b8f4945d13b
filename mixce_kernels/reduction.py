"""From tokens' losses to the loss: weights, divisor and sum, as a record for the kernels and as the formula in PyTorch.

Factors, sums and quotients of tokens are float64: beside a vocabulary that is free, and the loss is rounded once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixce_kernels.options import LossOptions

# Those that the kernels read numbers of.
NUMBER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64)


class Reduction(NamedTuple):
    """What is done to the tokens' losses [...]: multiplied by the weights, added up, divided."""

    kind: str = "none"  # one of `options.REDUCTIONS`
    weights: Tensor | None = None  # [...] of a floating type; whatever stands at an ignored token does not matter
    num_items: Tensor | None = None  # [], what "mean" divides by
    num_items_value: float | None = None  # used where num_items is None; None: the valid tokens' weights, added up

    @classmethod
    def of(cls, options: LossOptions, targets: Tensor) -> Reduction:
        """The reduction that the options ask for, which have passed `LossOptions.check_reduction`."""
        kind, weights, num_items = options.reduction, options.token_weights, options.num_items_in_batch
        if weights is not None and weights.dtype not in NUMBER_DTYPES:
            weights = weights.double()
        if num_items is not None and (isinstance(num_items, Tensor) or torch.compiler.is_compiling()):
            if not isinstance(num_items, Tensor):
                # As a sum: an operator would have a number baked in that the compiler traces as a symbol.
                num_items = torch.zeros((), dtype=torch.float64, device=targets.device) + num_items
            dtype = num_items.dtype if num_items.dtype in NUMBER_DTYPES else torch.float64
            num_items = num_items.reshape(()).to(targets.device, dtype, non_blocking=True)
            return cls(kind, weights, num_items)
        return cls(kind, weights, None, None if num_items is None else float(num_items))

    @property
    def sums(self) -> bool:
        """Whether the loss is one number."""
        return self.kind != "none"

    @property
    def scales_tokens(self) -> bool:
        """Whether a token's loss has a factor in the result."""
        return self.kind == "mean" or self.weights is not None

    @property
    def is_identity(self) -> bool:
        """Whether the tokens' losses are the result."""
        return self.kind == "none" and self.weights is None

    def apply(self, losses: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        """The loss of the tokens' losses [...], by PyTorch."""
        if self.is_identity:
            return losses
        valid = targets != ignore_index
        weights = valid.double() if self.weights is None else torch.where(valid, self.weights.double(), 0.0)
        loss = losses.double() * weights
        if self.sums:
            loss = loss.sum()
        if self.kind == "mean":
            divisor = weights.sum() if self.num_items_value is None else weights.new_tensor(self.num_items_value)
            divisor = divisor if self.num_items is None else self.num_items.double()
            loss = loss / torch.where(divisor == 0, 1.0, divisor)
        return loss.to(losses.dtype)


# Once a forward has made tokens' factors of a reduction, nobody reads it again.
NO_REDUCTION = Reduction()
