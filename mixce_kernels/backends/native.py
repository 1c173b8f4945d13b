"""The native extension, and how tensors become its arguments: for the backends `cpu` and `cuda`."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from mixce_kernels.backends.layout import RowLayout, entries, reachable_layout
from mixce_kernels.backends.results import EntropyGrad, Results
from mixce_kernels.mixture import Mixture
from mixce_kernels.options import TokenOptions, accumulate_dtype
from mixce_kernels.reduction import Reduction

# After torch, which brings the OpenMP runtime that the extension shares.
MISSING: str | None = None
try:
    from mixce_kernels import _C
except ImportError as error:
    MISSING = f"the native extension is missing ({error}); reinstall mixce_kernels where a C++ compiler is found"
HAS_CUDA = MISSING is None and hasattr(_C, "cuda_forward")
CPU_FEATURES = frozenset(_C.cpu_features() if MISSING is None else ())

DTYPES = {
    torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, torch.int32: 4, torch.int64: 5
}  # fmt: skip


def row_params(
    *,
    logits: Tensor,  # [..., V]
    targets: Tensor | None,  # [...], contiguous
    state: Tensor | None,  # [STATE_WIDTH, ...], contiguous
    options: TokenOptions,
    grad_loss: Tensor | None,  # [] or [...], of the type of arithmetic
    token_scale: Tensor | None,  # [] or [...] float64
    grad_logits: Tensor | None,  # [..., V]
) -> tuple[_C.RowParams, Tensor | None]:
    """The rows of a call, see csrc/params.h, and a tensor that they point to: keep it until they have been launched."""
    shape = _row_params_of_shape(
        logits.shape,
        logits.stride(),
        None if grad_logits is None or grad_logits is logits else grad_logits.stride(),
        logits.dtype,
        None if targets is None else targets.dtype,
        options,
    )
    grad_loss, grad_loss_stride = (None, 0) if grad_loss is None else entries(grad_loss)
    token_scale, token_scale_stride = (None, 0) if token_scale is None else entries(token_scale)
    params = _C.row_params(
        shape,
        logits=logits.data_ptr(),
        targets=0 if targets is None else targets.data_ptr(),
        grad_logits=0 if grad_logits is None else grad_logits.data_ptr(),
        state=0 if state is None else state.data_ptr(),
        grad_loss=0 if grad_loss is None else grad_loss.data_ptr(),
        grad_loss_stride=grad_loss_stride,
        token_scale=0 if token_scale is None else token_scale.data_ptr(),
        token_scale_stride=token_scale_stride,
    )
    return params, grad_loss


def forward_call(
    *,
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...], contiguous
    mixture: Mixture,
    options: TokenOptions,
    reduction: Reduction,
    results: Results,
    token_scale: Tensor | None,  # [] or [...]
    grad_logits: Tensor | None,  # [..., V]
    temperature: Tensor | None,  # [...]
) -> tuple[_C.ForwardCall, tuple[Tensor | None, ...]]:
    """The arguments of a forward, and tensors that they point to: keep these until it has been launched."""
    loss, new_token_scale, state, stats, correct, losses, entropy_state = results
    kind, weights, num_items, num_items_value = reduction
    eta, eta_value, weighting, parameters, first, second = mixture
    eta, eta_stride = (None, 0) if eta is None else entries(eta.to(loss.dtype))
    parameters = None if parameters is None else parameters.contiguous()
    upstream, upstream_stride = (None, 0) if token_scale is None else entries(token_scale)
    weights, weights_stride = (None, 0) if weights is None else entries(weights)
    shape = _forward_call_of_shape(
        logits.shape,
        logits.stride(),
        None if grad_logits is None or grad_logits is logits else grad_logits.stride(),
        logits.dtype,
        targets.dtype,
        options,
        kind,
        (upstream_stride, eta_stride, weights_stride),
        None if weights is None else weights.dtype,
        None if num_items is None else num_items.dtype,
    )
    call = _C.forward_call(
        shape,
        logits=logits.data_ptr(),
        targets=targets.data_ptr(),
        grad_logits=0 if grad_logits is None else grad_logits.data_ptr(),
        upstream=0 if upstream is None else upstream.data_ptr(),
        eta=0 if eta is None else eta.data_ptr(),
        eta_value=eta_value,
        weighting=weighting,
        parameters=0 if parameters is None else parameters.data_ptr(),
        first=first,
        second=second,
        weights=0 if weights is None else weights.data_ptr(),
        num_items=0 if num_items is None else num_items.data_ptr(),
        num_items_value=math.nan if num_items_value is None else num_items_value,
        loss=loss.data_ptr(),
        token_scale=0 if new_token_scale is None else new_token_scale.data_ptr(),
        losses=0 if losses is None else losses.data_ptr(),
        state=0 if state is None else state.data_ptr(),
        stats=0 if stats is None else stats.data_ptr(),
        correct=0 if correct is None else correct.data_ptr(),
    )
    kept: tuple[Tensor | None, ...] = (eta, parameters, upstream, weights)
    if temperature is not None or entropy_state is not None:
        kept += add_logprobs(call.rows, loss.dtype, temperature, entropy_state, None)
    return call, kept


def grad_params(
    *,
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    state: Tensor,  # [STATE_WIDTH, ...]
    grad_loss: Tensor | None,  # [] or [...]
    token_scale: Tensor | None,  # [] or [...]
    options: TokenOptions,
    grad_logits: Tensor,  # [..., V]
    temperature: Tensor | None,  # [...]
    entropy: EntropyGrad | None,
) -> tuple[_C.RowParams, tuple[Tensor | None, ...]]:
    """The rows of a gradient, and the tensors that they point to: keep these until it has been launched."""
    targets, state = targets.contiguous(), state.contiguous()
    rows, grad_loss = row_params(
        logits=logits,
        targets=targets,
        state=state,
        options=options,
        grad_loss=None if grad_loss is None else grad_loss.to(state.dtype),
        token_scale=token_scale,
        grad_logits=grad_logits,
    )
    kept: tuple[Tensor | None, ...] = (targets, state, grad_loss)
    if temperature is not None or entropy is not None:
        upstream, entropy_state = (None, None) if entropy is None else entropy
        kept += add_logprobs(rows, state.dtype, temperature, entropy_state, upstream)
    return rows, kept


def add_logprobs(
    rows: _C.RowParams,
    dtype: torch.dtype,  # of arithmetic
    temperature: Tensor | None,  # [...]
    entropy_state: Tensor | None,  # [ENTROPY_STATE_WIDTH, ...]
    grad_entropy: Tensor | None,  # [] or [...]
) -> tuple[Tensor | None, ...]:
    """Adds to rows what log-probabilities need; returns the tensors that they point to: keep these until the launch."""
    temperature = None if temperature is None else temperature.to(dtype).contiguous()
    entropy_state = None if entropy_state is None else entropy_state.contiguous()
    grad_entropy, stride = (None, 0) if grad_entropy is None else entries(grad_entropy.to(dtype))
    _C.add_logprobs(
        rows,
        temperature=0 if temperature is None else temperature.data_ptr(),
        entropy_state=0 if entropy_state is None else entropy_state.data_ptr(),
        grad_entropy=0 if grad_entropy is None else grad_entropy.data_ptr(),
        grad_entropy_stride=stride,
    )
    return temperature, entropy_state, grad_entropy


def scale_params(
    *,
    grad_logits: Tensor,  # [..., V]
    grad_loss: Tensor,  # [] or [...]
    targets: Tensor | None,  # [...]
    ignore_index: int,
) -> tuple[_C.RowParams, tuple[Tensor | None, ...]]:
    """The rows of a gradient and their factors, and the tensors that they point to: keep these until the launch."""
    targets = None if targets is None else targets.contiguous()
    rows, grad_loss_entries = row_params(
        logits=grad_logits,
        targets=targets,
        state=None,
        options=TokenOptions(ignore_index),
        grad_loss=grad_loss.to(accumulate_dtype(grad_logits.dtype)),
        token_scale=None,
        grad_logits=grad_logits,
    )
    return rows, (targets, grad_loss_entries)


def reduction_params(
    *,
    targets: Tensor,  # [...], contiguous
    ignore_index: int,
    reduction: Reduction,
    losses: Tensor | None,  # [...]
    loss: Tensor | None,  # [] or [...]
    token_scale: Tensor | None,  # [] or [...]
) -> tuple[_C.ReductionParams, Tensor | None]:
    """The arguments of a reduction, and a tensor that they point to: keep it until it has been launched."""
    kind, weights, num_items, num_items_value = reduction
    weights, weights_stride = (None, 0) if weights is None else entries(weights)
    params = _C.reduction_params(
        losses=0 if losses is None else losses.data_ptr(),
        number=targets.numel(),
        targets=targets.data_ptr(),
        targets_int64=targets.dtype is torch.int64,
        dtype=0 if losses is None else DTYPES[losses.dtype],
        ignore_index=ignore_index,
        sums=kind != "none",
        mean=kind == "mean",
        weights=0 if weights is None else weights.data_ptr(),
        weights_stride=weights_stride,
        weights_dtype=0 if weights is None else DTYPES[weights.dtype],
        num_items=0 if num_items is None else num_items.data_ptr(),
        num_items_dtype=0 if num_items is None else DTYPES[num_items.dtype],
        num_items_value=math.nan if num_items_value is None else num_items_value,
        loss=0 if loss is None else loss.data_ptr(),
        token_scale=0 if token_scale is None else token_scale.data_ptr(),
    )
    return params, weights


@functools.lru_cache(maxsize=1024)
def _forward_call_of_shape(
    shape: torch.Size,
    strides: tuple[int, ...],
    grad_strides: tuple[int, ...] | None,  # None: as the logits'
    dtype: torch.dtype,
    targets_dtype: torch.dtype,
    options: TokenOptions,
    kind: str,
    entry_strides: tuple[int, int, int],  # of the upstream gradient, eta and the weights
    weights_dtype: torch.dtype | None,
    num_items_dtype: torch.dtype | None,
) -> _C.ForwardCall:
    """What a forward has of its sizes and options, kept for later calls."""
    upstream_stride, eta_stride, weights_stride = entry_strides
    reduction = _C.reduction_params(
        losses=0,
        number=math.prod(shape[:-1]),
        targets=0,
        targets_int64=targets_dtype is torch.int64,
        dtype=DTYPES[dtype],
        ignore_index=options.ignore_index,
        sums=kind != "none",
        mean=kind == "mean",
        weights=0,
        weights_stride=weights_stride,
        weights_dtype=0 if weights_dtype is None else DTYPES[weights_dtype],
        num_items=0,
        num_items_dtype=0 if num_items_dtype is None else DTYPES[num_items_dtype],
        num_items_value=math.nan,
        loss=0,
        token_scale=0,
    )
    return _C.forward_call_of_shape(
        rows=_row_params_of_shape(shape, strides, grad_strides, dtype, targets_dtype, options),
        upstream_stride=upstream_stride,
        eta_stride=eta_stride,
        reduction=reduction,
        reduces=kind != "none" or weights_dtype is not None,
    )


def _reachable_rows(shape: torch.Size, strides: tuple[int, ...]) -> RowLayout:
    return reachable_layout(torch.empty_strided(shape, strides, device="meta"))


@functools.lru_cache(maxsize=1024)
def _row_params_of_shape(
    shape: torch.Size,
    strides: tuple[int, ...],
    grad_strides: tuple[int, ...] | None,  # None: as the logits'
    dtype: torch.dtype,
    targets_dtype: torch.dtype | None,
    options: TokenOptions,
) -> _C.RowParams:
    """What the rows of a call have of its sizes and options, kept for later calls."""
    rows = _reachable_rows(shape, strides)
    grad_rows = rows if grad_strides is None else _reachable_rows(shape, grad_strides)
    return _C.row_params_of_shape(
        logits_rows=_C.row_layout(**rows._asdict()),
        grad_rows=_C.row_layout(**grad_rows._asdict()),
        vocab_size=shape[-1],
        dtype=DTYPES[dtype],
        targets_int64=targets_dtype is torch.int64,
        options=_C.token_options(**options._asdict()),
    )
