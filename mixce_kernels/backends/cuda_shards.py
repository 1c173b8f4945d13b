"""`ShardKernels` of the backend `cuda`: the kernels of csrc/cuda/cuda_shards.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from mixce_kernels.backends import native, native_shards
from mixce_kernels.backends.devices import device_index, on_device
from mixce_kernels.backends.results import Results
from mixce_kernels.backends.shards import Columns, ShardRows
from mixce_kernels.mixture import Mixture
from mixce_kernels.options import TokenOptions

if native.HAS_CUDA:
    from mixce_kernels import _C


def localize_targets(targets: Tensor, columns: Columns, ignore_index: int, elsewhere: int) -> Tensor:
    """Targets from the rank's first column on: see `ShardKernels`."""
    local, targets = targets.new_empty(targets.shape, dtype=torch.int64), targets.contiguous()
    params = native_shards.targets_params(local, targets, columns, ignore_index, elsewhere)
    with on_device(targets):
        _C.cuda_localize_targets(*params, _launch(targets))
    return local


def write_message(
    message: Tensor,
    digest: int,
    columns: Columns,
    targets: Tensor,
    rows: ShardRows | None,
    options: TokenOptions,
    with_stats: bool,
) -> None:
    """What the rank tells the others: see `ShardKernels`."""
    targets = targets.contiguous()
    params = native_shards.message_params(message, digest, columns, targets, rows, options, with_stats)
    with on_device(targets):
        _C.cuda_write_message(*params, _launch(targets))


def merge_messages(
    messages: Tensor,
    targets: Tensor,
    mixture: Mixture,
    options: TokenOptions,
    results: Results,
    temperature: Tensor | None,
) -> None:
    """Loss, state and statistics of the whole rows: see `ShardKernels`."""
    targets = targets.contiguous()
    params, _kept = native_shards.merge_params(messages, targets, mixture, options, results, temperature)
    with on_device(targets):
        _C.cuda_merge_messages(*params, _launch(targets))


def _launch(tensor: Tensor) -> _C.CudaLaunch:
    return _C.cuda_launch(
        device=device_index(tensor),
        stream=torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0,
        parts=1,
        shared_bytes=0,
        from_shared=False,
        partials=0,
    )
