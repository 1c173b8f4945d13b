"""Cross-entropy of a vocabulary split over ranks, as Megatron-LM computes it: plain PyTorch, three all-reduces.

It takes the steps of `megatron/core/tensor_parallel/cross_entropy.py`, in its types and in place where that is: the
logits become float32, the softmax of the rank's columns is kept for the backward and becomes the gradient there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from harness.contenders import IGNORE_INDEX


def three_all_reduces(
    logits: Tensor,  # [N, columns of this rank]
    targets: Tensor,  # [N], of the whole vocabulary
    group: dist.ProcessGroup,
    vocab_start: int,
) -> Tensor:
    """The mean over the tokens that are not ignored, which is taken outside of the function, as in Megatron-LM."""
    losses: Tensor = _ThreeAllReduces.apply(logits, targets, group, vocab_start)
    valid = targets != IGNORE_INDEX
    return torch.where(valid, losses, 0.0).sum() / valid.sum()


class _ThreeAllReduces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: dist.ProcessGroup, vocab_start: int) -> Tensor:
        # Of float32 logits it would otherwise overwrite the caller's.
        shifted = logits.clone() if logits.dtype == torch.float32 else logits.float()
        largest = shifted.max(dim=-1)[0]
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        shifted -= largest.unsqueeze(-1)

        elsewhere = (targets < vocab_start) | (targets >= vocab_start + logits.shape[-1])
        held = targets.clone() - vocab_start
        held[elsewhere] = 0
        rows = torch.arange(held.numel(), device=logits.device)
        target_logits = shifted[rows, held]
        target_logits[elsewhere] = 0.0
        dist.all_reduce(target_logits, group=group)

        softmax = torch.exp(shifted, out=shifted)
        sums = softmax.sum(dim=-1)
        dist.all_reduce(sums, group=group)
        losses = torch.log(sums) - target_logits
        softmax.div_(sums.unsqueeze(-1))
        ctx.save_for_backward(softmax, elsewhere, held)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, elsewhere, held = ctx.saved_tensors
        rows = torch.arange(held.numel(), device=softmax.device)
        softmax[rows, held] -= 1.0 - elsewhere.float()
        # The gradient; autograd rounds it to the logits' type.
        return softmax.mul_(grad_losses.unsqueeze(-1)), None, None, None
