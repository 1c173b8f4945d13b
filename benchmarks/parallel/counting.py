"""Counts what PyTorch's operators, and kernels of ours that are left out, launch, move and send: see counts.py.

Each reads its operands and writes its results; views and allocations cost nothing, and a gather reads what it returns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

# Made on the host, or no memory is touched.
_NOTHING = {"scalar_tensor", "detach", "alias", "lift_fresh", "_unsafe_view"}
_WRITERS = {"copy_", "fill_", "zero_"}
_GATHERS = {"gather", "index"}
_COLLECTIVES = ("c10d", "_c10d_functional")
_NO_COLLECTIVES = {"wait_tensor", "_wrap_tensor_autograd"}


@dataclass
class Counted:
    """Of one step on one rank."""

    launches: int = 0
    moved_bytes: int = 0
    sent: list[int] = field(default_factory=list)  # bytes that each collective takes from the rank
    held_bytes: int = 0  # at the step's peak, beside the inputs and the gradient

    def add(self, other: Counted) -> None:
        """Another part of the same step."""
        self.launches += other.launches
        self.moved_bytes += other.moved_bytes
        self.sent += other.sent


class Counting(TorchDispatchMode):
    """Counts the operators that run inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = Counted()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            # What it does with the rank's own tensors comes by here.
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if func.namespace in _COLLECTIVES:
            if name not in _NO_COLLECTIVES:
                # An all-gather's operands are its result and its message; a reduction's is its message.
                message = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)][-1]
                self.counted.sent.append(message.numel() * message.element_size())
        elif func.namespace == "aten" and not (func.is_view or name in _NOTHING or "empty" in name):
            self.counted.launches += 1
            self.counted.moved_bytes += _moved(name, args, result)
        return result


def _moved(name: str, args: Any, result: Any) -> int:
    operands = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    written = sum(map(_nbytes, tree_leaves(result)))
    if name in _GATHERS:
        return 2 * written + sum(map(_nbytes, operands[1:]))
    if name == "index_put_":
        return sum(map(_nbytes, operands[1:])) + _nbytes(operands[-1])
    return written + sum(map(_nbytes, operands[1:] if name in _WRITERS else operands))


def _nbytes(leaf: Any) -> int:
    return leaf.numel() * leaf.element_size() if isinstance(leaf, Tensor) else 0


def count_launch(*tensors: Tensor | None) -> None:
    """Counts one of our kernels."""
    mode = _get_current_dispatch_mode()
    if isinstance(mode, Counting):
        mode.counted.launches += 1
        mode.counted.moved_bytes += sum(map(_nbytes, tensors))
