"""Checks of single values: numbers that options are, and tensors that nothing is differentiated by."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_scalar


def concrete(number: Any) -> Any:
    """The Python number itself, where a compiler traces it as a symbol: another number compiles anew.

    As an argument of an operator a symbol is baked into the compiled code without a guard, and later calls get the
    result of an earlier number (seen with torch 2.13; torch.nn.functional.cross_entropy's label_smoothing, too).
    """
    return guard_scalar(number) if torch.compiler.is_compiling() else number


def check_constant(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(f"expected {name} without requires_grad, since nothing is differentiated by it, got one with")


def token_tensor(name: str, tensor: Tensor, targets: Tensor) -> Tensor:
    """A tensor of numbers, one a token or fewer, as one of targets' shape [...].

    Raises:
        TypeError: it is not floating.
        ValueError: it requires grad, lies elsewhere or does not broadcast.
    """
    if not tensor.is_floating_point():
        raise TypeError(f"expected {name} to be a number or a floating tensor, got a tensor of {tensor.dtype}")
    check_constant(name, tensor)
    if tensor.device != targets.device:
        raise ValueError(f"expected {name} on {targets.device} with the logits, got {tensor.device}")
    try:
        return tensor.expand(targets.shape)
    except RuntimeError:
        raise ValueError(
            f"expected {name} to broadcast to targets of shape {list(targets.shape)}, got shape {list(tensor.shape)}"
        ) from None


def is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_int64(name: str, value: int) -> None:
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"expected {name} to be an int of 64 bits, got {value}")


def option_number(name: str, value: object) -> float:
    """An option as a Python float that an operator may have."""
    return float(concrete(as_float(name, value)))


def as_float(name: str, value: object) -> float:
    if type(value) is float:
        return value
    if not isinstance(value, numbers.Real):
        raise TypeError(f"expected {name} to be a number, got {describe(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"expected {name} to be a number that a float holds, got {value}") from None


def describe(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
