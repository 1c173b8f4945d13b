"""Memory for what a forward writes."""

from __future__ import annotations

import torch
from torch import Tensor

from mixce_kernels.options import accumulate_dtype


def empty_results(logits: Tensor, targets: Tensor, with_stats: bool) -> tuple[Tensor, ...]:
    """Loss [...], state [5, ...], and statistics [5, ...] and correct [...] where asked for, else [0]."""
    shape, dtype = targets.shape, accumulate_dtype(logits.dtype)
    loss = logits.new_empty(shape, dtype=dtype)
    state = logits.new_empty((5, *shape), dtype=dtype)
    stats = logits.new_empty((5, *shape) if with_stats else (0,), dtype=dtype)
    correct = logits.new_empty(shape if with_stats else (0,), dtype=torch.bool)
    return loss, state, stats, correct
