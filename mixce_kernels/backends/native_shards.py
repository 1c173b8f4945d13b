"""The records of csrc/shards.h: for the backends `cpu` and `cuda`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from mixce_kernels.backends import native
from mixce_kernels.backends.results import Results
from mixce_kernels.backends.shards import IGNORED, Columns, ShardRows
from mixce_kernels.mixture import Mixture
from mixce_kernels.options import TokenOptions

if native.MISSING is None:
    from mixce_kernels import _C


# Of a call that reads no mixture.
_NO_MIXTURE = native.mixture_arguments(Mixture(), torch.float32)[0]


def targets_params(
    local: Tensor,  # [...], written
    targets: Tensor,  # [...], contiguous
    columns: Columns,
    ignore_index: int,
    elsewhere: int,
) -> tuple[_C.RowParams, _C.LocalTargets]:
    """The arguments of `localize_targets`."""
    to = _C.local_targets(
        columns=_C.columns(**columns._asdict()), ignored=IGNORED, elsewhere=elsewhere, local=local.data_ptr()
    )
    return _tokens(targets, None, torch.float32, TokenOptions(ignore_index)), to


def message_params(
    message: Tensor,
    digest: int,
    columns: Columns,
    targets: Tensor,  # [...], contiguous
    rows: ShardRows | None,
    options: TokenOptions,
    with_stats: bool,
) -> tuple[_C.RowParams, _C.ForwardParams, _C.ShardMessage]:
    """The arguments of `write_message`."""
    results, largest_state = (None, None) if rows is None else rows
    to = _C.shard_message(
        columns=_C.columns(**columns._asdict()),
        digest=digest,
        with_stats=with_stats,
        largest_state=0 if largest_state is None else largest_state.data_ptr(),
        message=message.data_ptr(),
    )
    state = None if results is None else results.state
    return _tokens(targets, state, message.dtype, options), _results(results, eta_stride=0, **_NO_MIXTURE), to


def merge_params(
    messages: Tensor,
    targets: Tensor,  # [...], contiguous
    mixture: Mixture,
    options: TokenOptions,
    results: Results,
) -> tuple[tuple[_C.RowParams, _C.ForwardParams, _C.Messages], tuple[Tensor | None, ...]]:
    """The arguments of `merge_messages`, and the tensors that they point to: keep these until it has been launched."""
    mixed, eta_stride, kept = native.mixture_arguments(mixture, results.loss.dtype)
    ranks, length = messages.shape
    params = (
        _tokens(targets, results.state, messages.dtype, options),
        _results(results, eta_stride=eta_stride, **mixed),
        _C.messages(messages=messages.data_ptr(), ranks=ranks, length=length),
    )
    return params, kept


def _tokens(targets: Tensor, state: Tensor | None, dtype: torch.dtype, options: TokenOptions) -> _C.RowParams:
    """Rows of which there are only the numbers of their tokens."""
    return _C.row_params(
        _tokens_of_shape(targets.numel(), native.DTYPES[dtype], targets.dtype is torch.int64, options),
        logits=0,
        targets=targets.data_ptr(),
        grad_logits=0,
        state=0 if state is None else state.data_ptr(),
        grad_loss=0,
        grad_loss_stride=0,
        token_scale=0,
        token_scale_stride=0,
    )


def _results(results: Results | None, **mixture: Any) -> _C.ForwardParams:
    losses, stats, correct = (None,) * 3 if results is None else (results.losses, results.stats, results.correct)
    return _C.forward_params(
        **mixture,
        losses=0 if losses is None else losses.data_ptr(),
        stats=0 if stats is None else stats.data_ptr(),
        correct=0 if correct is None else correct.data_ptr(),
    )


@functools.lru_cache(maxsize=1024)
def _tokens_of_shape(number: int, dtype: int, targets_int64: bool, options: TokenOptions) -> _C.RowParams:
    """What does not change from call to call, kept for later ones."""
    rows = _C.row_layout(number=number, inner=1, outer_stride=0, inner_stride=0)
    return _C.row_params_of_shape(
        logits_rows=rows,
        grad_rows=rows,
        vocab_size=0,
        dtype=dtype,
        targets_int64=targets_int64,
        options=_C.token_options(**options._asdict()),
    )
