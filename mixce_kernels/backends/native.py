"""The native extension, and how tensors become its arguments: for the backends `cpu` and `cuda`."""

from __future__ import annotations

import torch
from torch import Tensor

from mixce_kernels.backends.layout import flat, reachable_layout
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
    logits: Tensor,  # [..., V]
    targets: Tensor | None,  # [...], contiguous
    state: Tensor | None,  # [5, ...], contiguous
    options: TokenOptions,
    grad_loss: Tensor | None,  # [N], of the type of arithmetic
    grad_loss_stride: int,
    grad_logits: Tensor | None,  # [..., V]
    *,
    threads: int = 1,
    stream: bool = False,
) -> _C.RowParams:
    """The rows of a call; see csrc/params.h."""
    rows = reachable_layout(logits)
    grad_rows = rows if grad_logits is None or grad_logits is logits else reachable_layout(grad_logits)
    logits_layout = _C.RowLayout(rows.inner, rows.outer_stride, rows.inner_stride)
    grad_layout = (
        logits_layout
        if grad_rows == rows
        else _C.RowLayout(grad_rows.inner, grad_rows.outer_stride, grad_rows.inner_stride)
    )
    return _C.RowParams(
        logits.data_ptr(),
        logits_layout,
        0 if targets is None else targets.data_ptr(),
        targets is not None and targets.dtype == torch.int64,
        rows.number,
        logits.shape[-1],
        DTYPES[logits.dtype],
        options.ignore_index,
        options.label_smoothing,
        options.z_loss,
        options.softcap or 0.0,
        options.logit_scale,
        0 if grad_logits is None else grad_logits.data_ptr(),
        grad_layout,
        0 if grad_loss is None else grad_loss.data_ptr(),
        grad_loss_stride,
        0 if state is None else state.data_ptr(),
        threads,
        stream,
    )


def forward_params(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    eta: Tensor | None,  # [...]
    eta_value: float,
    options: TokenOptions,
    results: Results,
    grad_loss: Tensor | None,  # [...]
    grad_logits: Tensor | None,  # [..., V]
    *,
    threads: int = 1,
    stream: bool = False,
) -> tuple[_C.RowParams, _C.ForwardParams, tuple[Tensor | None, ...]]:
    """The arguments of a forward, and the tensors that they point to: keep these until it has been launched."""
    loss, state, stats, correct = results
    dtype = accumulate_dtype(logits.dtype)
    eta, eta_stride = (None, 0) if eta is None else flat(eta.to(dtype))
    grad_loss, grad_loss_stride = (None, 0) if grad_loss is None else flat(grad_loss.to(dtype))
    targets = targets.contiguous()
    with_stats = results.with_stats
    rows = row_params(
        logits, targets, state, options, grad_loss, grad_loss_stride, grad_logits, threads=threads, stream=stream
    )
    forward = _C.ForwardParams(
        0 if eta is None else eta.data_ptr(),
        eta_stride,
        eta_value,
        loss.data_ptr(),
        stats.data_ptr() if with_stats else 0,
        correct.data_ptr() if with_stats else 0,
    )
    return rows, forward, (targets, eta, grad_loss)
