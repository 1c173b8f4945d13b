"""What the ranks of a group tell each other: collectives, and those with a derivative of their own.

A tensor that is the same on every rank counts once in a loss, however many ranks hold it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def group_name(group: dist.ProcessGroup | None) -> str:
    """The name of a process group, by which operators find it; of all ranks, for None.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        TypeError: it is no group, or one that this rank is not in.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("expected torch.distributed to be initialised (torch.distributed.init_process_group)")
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"expected group to be a ProcessGroup that this rank is in, or None, got {type(group).__name__}"
        )
    return group.group_name


def group_of(name: str) -> dist.ProcessGroup:
    """The process group of that name."""
    return torch.distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type, attr-defined]


def all_gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The ranks' tensors [...] of one shape, stacked: [k, ...]."""
    # The name of it since torch 2.13, which warns of the other.
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    gathered = tensor.new_empty((group.size() * tensor.numel(),))
    gather(gathered, tensor.contiguous().view(-1), group=group)
    return gathered.view(-1, *tensor.shape)


def total(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of the ranks' tensors, detached."""
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, group=group)
    return result


def largest(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The largest of the ranks' tensors entry by entry, detached."""
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, dist.ReduceOp.MAX, group=group)
    return result


def copy_to(group: dist.ProcessGroup, tensor: Tensor) -> Tensor:
    """A tensor that is the same on every rank, for work of the rank's own: its gradient is the sum of the ranks'."""
    return _CopyTo.apply(tensor, group)


def sum_over(group: dist.ProcessGroup, tensor: Tensor) -> Tensor:
    """The sum of the ranks' tensors, the same on every rank: the gradient of each of them is that of the sum."""
    return _SumOver.apply(tensor, group)


# Their contexts are set up apart, as torch.func asks for.


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, dist.ProcessGroup], output: Tensor) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_over(ctx.group, grad), None


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        return total(tensor, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, dist.ProcessGroup], output: Tensor) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return copy_to(ctx.group, grad), None
