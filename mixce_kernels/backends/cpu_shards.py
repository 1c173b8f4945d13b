"""`ShardKernels` of the backend `cpu`: loops over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from mixce_kernels.backends import native, native_shards
from mixce_kernels.backends.results import Results
from mixce_kernels.backends.shards import Columns, ShardRows
from mixce_kernels.mixture import Mixture
from mixce_kernels.options import TokenOptions

if native.MISSING is None:
    from mixce_kernels import _C


def localize_targets(targets: Tensor, columns: Columns, ignore_index: int, elsewhere: int) -> Tensor:
    """Targets from the rank's first column on: see `ShardKernels`."""
    local, targets = targets.new_empty(targets.shape, dtype=torch.int64), targets.contiguous()
    _C.cpu_localize_targets(*native_shards.targets_params(local, targets, columns, ignore_index, elsewhere))
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
    _C.cpu_write_message(*native_shards.message_params(message, digest, columns, targets, rows, options, with_stats))


def merge_messages(
    messages: Tensor,
    targets: Tensor,
    mixture: Mixture,
    options: TokenOptions,
    results: Results,
    temperature: Tensor | None,
) -> int | None:
    """Loss, state and statistics of the whole rows, or the first that not just one rank holds: see `ShardKernels`."""
    targets = targets.contiguous()
    params, _kept = native_shards.merge_params(messages, targets, mixture, options, results, temperature)
    bad_row = _C.cpu_merge_messages(*params)
    return bad_row if bad_row >= 0 else None
