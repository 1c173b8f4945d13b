"""The records of csrc/shards.h: for the backends `cpu` and `cuda`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mixce_kernels.backends import native
from mixce_kernels.backends.layout import entries
from mixce_kernels.backends.results import Results
from mixce_kernels.backends.shards import IGNORED, Columns, ShardRows
from mixce_kernels.mixture import Mixture
from mixce_kernels.options import TokenOptions

if native.MISSING is None:
    from mixce_kernels import _C


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
    return _tokens(targets, state, message.dtype, options), _results(results, Mixture(), 0), to


def merge_params(
    messages: Tensor,
    targets: Tensor,  # [...], contiguous
    mixture: Mixture,
    options: TokenOptions,
    results: Results,
    temperature: Tensor | None,  # [...]
) -> tuple[tuple[_C.RowParams, _C.ForwardParams, _C.Messages], tuple[Tensor | None, ...]]:
    """The arguments of `merge_messages`, and the tensors that they point to: keep these until it has been launched."""
    eta, parameters = mixture.tensors()
    eta, eta_stride = (None, 0) if eta is None else entries(eta.to(results.loss.dtype))
    mixture = mixture.with_tensors(eta, None if parameters is None else parameters.contiguous())
    ranks, length = messages.shape
    tokens = _tokens(targets, results.state, messages.dtype, options)
    kept: tuple[Tensor | None, ...] = mixture.tensors()
    if temperature is not None or results.entropy_state is not None:
        kept += native.add_logprobs(tokens, messages.dtype, temperature, results.entropy_state, None)
    params = (
        tokens,
        _results(results, mixture, eta_stride),
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


def _results(results: Results | None, mixture: Mixture, eta_stride: int) -> _C.ForwardParams:
    losses, stats, correct = (None,) * 3 if results is None else (results.losses, results.stats, results.correct)
    return _C.forward_params(
        eta=0 if mixture.eta is None else mixture.eta.data_ptr(),
        eta_stride=eta_stride,
        eta_value=mixture.eta_value,
        weighting=mixture.weighting,
        parameters=0 if mixture.parameters is None else mixture.parameters.data_ptr(),
        first=mixture.first,
        second=mixture.second,
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
