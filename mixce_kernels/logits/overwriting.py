"""When the gradient may take the logits' memory: in a backward, in a forward, under hooks, in a checkpoint."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixce_kernels.backends.layout import overlaps_itself


class Overwrite(enum.Enum):
    """Whether a backward may write the gradient over the logits that its forward saved."""

    NEVER = enum.auto()
    # Autograd keeps the logits and counts their versions: whoever else saved them gets its error.
    WATCHED = enum.auto()
    # Hooks give the logits back, and what they give to others has no versions. A checkpoint recomputes the logits for
    # all that saved them: the memory is free once nobody else refers to it.
    RECOMPUTED = enum.auto()

    @classmethod
    def of(cls, inplace: bool) -> Overwrite:
        """For a forward that runs now."""
        if not inplace:
            return cls.NEVER
        hooks = hooks_on_saved_tensors()
        if hooks is None:
            return cls.WATCHED
        _, unpack = hooks
        recomputes = getattr(unpack, "__module__", None) == "torch.utils.checkpoint"
        return cls.RECOMPUTED if recomputes else cls.NEVER

    def allowed(self, logits: Tensor) -> bool:
        """For the logits as they came back."""
        return self is Overwrite.WATCHED or (
            self is Overwrite.RECOMPUTED and _references(logits) <= _references(logits.new_empty(1))
        )


def check_overwritable(logits: Tensor) -> None:
    """Raises ValueError where the gradient would overwrite a leaf of the graph, which PyTorch refuses to write to, too.

    A parameter would become its own gradient.
    """
    # Where two rows share memory there is no place for two gradients, and nothing is overwritten.
    if not isinstance(logits, Tensor) or is_transformed():
        return
    if not logits.requires_grad or not torch.is_grad_enabled() or overlaps_itself(logits):
        return
    for tensor, name in ((logits, "a leaf"), (logits._base, "a view of a leaf")):
        if tensor is not None and tensor.is_leaf and tensor.requires_grad:
            raise ValueError(
                "expected logits that were computed for inplace_backward, whose gradient takes their memory, "
                f"got {name} that requires a gradient"
            )


def is_transformed() -> bool:
    """Whether the call is being compiled or transformed by torch.func: memory is then not ours to write over."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def hooks_on_saved_tensors() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """The hooks under which autograd saves tensors now, as a checkpoint's; None where it keeps them as they are."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _references(tensor: Tensor) -> int:
    """The number of references to the tensor's memory, its own included."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
