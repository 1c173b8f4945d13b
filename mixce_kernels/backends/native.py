"""The native extension, and how tensors become its arguments: for the backends `cpu` and `cuda`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mixce_kernels.backends.layout import RowLayout, flat, reachable_layout
from mixce_kernels.backends.results import Results
from mixce_kernels.options import TokenOptions, accumulate_dtype

# After torch, which brings the OpenMP runtime that the extension shares.
MISSING: str | None = None
try:
    from mixce_kernels import _C
except ImportError as error:
    MISSING = f"the native extension is missing ({error}); reinstall mixce_kernels where a C++ compiler is found"
HAS_CUDA = MISSING is None and hasattr(_C, "cuda_forward")

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def row_params(
    *,
    logits: Tensor,  # [..., V]
    targets: Tensor | None,  # [...], contiguous
    state: Tensor | None,  # [STATE_WIDTH, ...], contiguous
    options: TokenOptions,
    grad_loss: Tensor | None,  # [N], of the type of arithmetic
    grad_loss_stride: int,
    grad_logits: Tensor | None,  # [..., V]
) -> _C.RowParams:
    """The rows of a call; see csrc/params.h."""
    rows = reachable_layout(logits)
    shape = _row_params_of_shape(
        rows,
        rows if grad_logits is None or grad_logits is logits else reachable_layout(grad_logits),
        logits.shape[-1],
        DTYPES[logits.dtype],
        targets is not None and targets.dtype is torch.int64,
        options,
    )
    return _C.row_params(
        shape,
        logits=logits.data_ptr(),
        targets=0 if targets is None else targets.data_ptr(),
        grad_logits=0 if grad_logits is None else grad_logits.data_ptr(),
        state=0 if state is None else state.data_ptr(),
        grad_loss=0 if grad_loss is None else grad_loss.data_ptr(),
        grad_loss_stride=grad_loss_stride,
    )


def forward_params(
    *,
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    eta: Tensor | None,  # [...]
    eta_value: float,
    options: TokenOptions,
    results: Results,
    grad_loss: Tensor | None,  # [...]
    grad_logits: Tensor | None,  # [..., V]
) -> tuple[_C.RowParams, _C.ForwardParams, tuple[Tensor | None, ...]]:
    """The arguments of a forward, and the tensors that they point to: keep these until it has been launched."""
    loss, state, stats, correct = results
    eta, eta_stride = (None, 0) if eta is None else flat(eta.to(loss.dtype))
    grad_loss, grad_loss_stride = (None, 0) if grad_loss is None else flat(grad_loss.to(loss.dtype))
    targets = targets.contiguous()
    rows = row_params(
        logits=logits,
        targets=targets,
        state=state,
        options=options,
        grad_loss=grad_loss,
        grad_loss_stride=grad_loss_stride,
        grad_logits=grad_logits,
    )
    with_stats = results.with_stats
    forward = _C.forward_params(
        eta=0 if eta is None else eta.data_ptr(),
        eta_stride=eta_stride,
        eta_value=eta_value,
        loss=loss.data_ptr(),
        stats=stats.data_ptr() if with_stats else 0,
        correct=correct.data_ptr() if with_stats else 0,
    )
    return rows, forward, (targets, eta, grad_loss)


def grad_params(
    *,
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    state: Tensor,  # [STATE_WIDTH, ...]
    grad_loss: Tensor,  # [...]
    options: TokenOptions,
    grad_logits: Tensor,  # [..., V]
) -> tuple[_C.RowParams, tuple[Tensor, ...]]:
    """The rows of a gradient, and the tensors that they point to: keep these until it has been launched."""
    grad_loss, grad_loss_stride = flat(grad_loss.to(state.dtype))
    targets, state = targets.contiguous(), state.contiguous()
    rows = row_params(
        logits=logits,
        targets=targets,
        state=state,
        options=options,
        grad_loss=grad_loss,
        grad_loss_stride=grad_loss_stride,
        grad_logits=grad_logits,
    )
    return rows, (targets, state, grad_loss)


def scale_params(grad_logits: Tensor, grad_loss: Tensor) -> tuple[_C.RowParams, Tensor]:
    """The rows of a gradient [..., V], and its factors [...]: keep these until it has been launched."""
    grad_loss, grad_loss_stride = flat(grad_loss.to(accumulate_dtype(grad_logits.dtype)))
    rows = row_params(
        logits=grad_logits,
        targets=None,
        state=None,
        options=TokenOptions(),
        grad_loss=grad_loss,
        grad_loss_stride=grad_loss_stride,
        grad_logits=grad_logits,
    )
    return rows, grad_loss


@functools.lru_cache(maxsize=1024)
def _row_params_of_shape(
    rows: RowLayout, grad_rows: RowLayout, vocab_size: int, dtype: int, targets_int64: bool, options: TokenOptions
) -> _C.RowParams:
    """What the rows of a call have of its sizes and options, kept for later calls."""
    return _C.row_params_of_shape(
        logits_rows=_C.row_layout(**rows._asdict()),
        grad_rows=_C.row_layout(**grad_rows._asdict()),
        vocab_size=vocab_size,
        dtype=dtype,
        targets_int64=targets_int64,
        options=_C.token_options(**options._asdict()),
    )
