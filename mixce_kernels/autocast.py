"""What autocast, where it is active, means for a tensor's device; some devices, as `meta`, know no autocast."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The type to which autocast converts the operands of products on the tensor's device; None where it is off."""
    if not isinstance(tensor, Tensor):
        return None
    device_type = tensor.device.type
    if not _has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """A region in which products on the tensor's device are of their operands' own type."""
    device_type = tensor.device.type
    return torch.autocast(device_type, enabled=False) if _has_autocast(device_type) else contextlib.nullcontext()


def _has_autocast(device_type: str) -> bool:
    # Compilers up to torch 2.11's do not know how to trace the question; they compile for devices that have it.
    return torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
