"""Devices as the backends for GPUs see them: which one a tensor is on, its facts, and why kernels cannot run there."""

from __future__ import annotations

import contextlib
import functools
import os

import torch
from torch import Tensor

WARP_SIZE = 64 if torch.version.hip else 32
# Multiprocessors that emulations of a GPU claim: few, so that small tests have several tiles for a program.
EMULATED_MULTIPROCESSORS = 3


def interpreted() -> bool:
    """Whether Triton interprets its kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def cpu_tensors() -> bool:
    """Whether kernels for GPUs accept tensors on the CPU: where something emulates a GPU."""
    return os.environ.get("MIXCE_CPU_TENSORS") == "1"


def unsuited_to_cuda(tensor: Tensor, name: str) -> str | None:
    """The sentence why CUDA kernels cannot run where the tensor `name` is; None where they can."""
    if tensor.device.type == "cpu":
        return None if cpu_tensors() else f"it runs on CUDA tensors, and {name} are on cpu"
    if tensor.device.type != "cuda" or torch.version.hip is not None:
        return f"it runs on tensors of an NVIDIA GPU, and {name} are on {tensor.device}"
    return None


def unsuited_to_triton(tensor: Tensor, name: str) -> str | None:
    """The sentence why Triton kernels cannot run where the tensor `name` is; None where they can."""
    if tensor.device.type == "cpu":
        if interpreted() or cpu_tensors():
            return None
        return f"it runs on CUDA and ROCm tensors (on the CPU under TRITON_INTERPRET=1), and {name} are on cpu"
    if tensor.device.type != "cuda":
        return f"it runs on CUDA and ROCm tensors, and {name} are on {tensor.device}"
    return None


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which the tensor's GPU is the current one."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


def device_index(tensor: Tensor) -> int:
    """The number of the tensor's GPU; 0 for a tensor on the CPU, in emulations."""
    return tensor.device.index if tensor.is_cuda else 0


def multiprocessors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's GPU."""
    if not tensor.is_cuda:
        return EMULATED_MULTIPROCESSORS
    return _multiprocessors(tensor.device.index)


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def triton_arch() -> int:
    """NVIDIA's architecture that Triton compiles for on the current device, 90 for sm_90; 0 elsewhere."""
    if interpreted():
        return 0
    from triton.runtime import driver

    target = driver.active.get_current_target()
    return int(target.arch) if target.backend == "cuda" else 0
