"""The backend `cpu`: hands tensors to the native kernels of `csrc/cpu` as pointers and strides."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from mixce_kernels.backends.rows import flat, rows_of
from mixce_kernels.options import TokenOptions, accumulate_dtype, raise_bad_target

# After torch, which brings the OpenMP runtime that the extension shares.
_missing: str | None = None
try:
    from mixce_kernels import _C
except ImportError as error:
    _missing = f"the native extension is missing ({error}); reinstall mixce_kernels where a C++ compiler is found"

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
# Below this many logits a second thread costs more than it saves.
_LOGITS_PER_THREAD = 1 << 15
# A gradient larger than this would push everything else out of the caches.
_STREAM_BYTES = 1 << 24


def unavailable(logits: Tensor) -> str | None:
    """Why the native kernels cannot serve these logits."""
    if _missing is not None:
        return _missing
    if logits.device.type != "cpu":
        return f"it runs on CPU tensors, and the logits are on {logits.device}"
    return None


def forward(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    eta: Tensor | None,  # [...]
    eta_value: float,
    options: TokenOptions,
    results: tuple[Tensor, ...],
    grad_loss: Tensor | None,  # [...]
    grad_logits: Tensor | None,  # [..., V]
) -> None:
    """Loss, state and statistics, with the gradient where `grad_logits` is given: see `backends.Backend`."""
    loss, state, stats, correct = results
    dtype = accumulate_dtype(logits.dtype)
    eta, eta_stride = (None, 0) if eta is None else flat(eta.to(dtype))
    grad_loss, grad_loss_stride = (None, 0) if grad_loss is None else flat(grad_loss.to(dtype))
    targets = targets.contiguous()
    with_stats = stats.dim() > 1
    bad_row = _C.cpu_forward(
        isa(),
        _row_params(logits, targets, state, options, grad_loss, grad_loss_stride, grad_logits),
        _C.ForwardParams(
            0 if eta is None else eta.data_ptr(),
            eta_stride,
            eta_value,
            loss.data_ptr(),
            stats.data_ptr() if with_stats else 0,
            correct.data_ptr() if with_stats else 0,
        ),
    )
    if bad_row >= 0:
        raise_bad_target(bad_row, targets, options.ignore_index, logits.shape[-1])


def logits_grad(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    state: Tensor,  # [5, ...]
    grad_loss: Tensor,  # [...]
    options: TokenOptions,
    grad_logits: Tensor,  # [..., V]
) -> None:
    """The gradient from the state of the forward: see `backends.Backend`."""
    grad_loss, grad_loss_stride = flat(grad_loss.to(state.dtype))
    targets, state = targets.contiguous(), state.contiguous()
    params = _row_params(logits, targets, state, options, grad_loss, grad_loss_stride, grad_logits)
    _C.cpu_logits_grad(isa(), params)


def scale_rows_(grad_logits: Tensor, grad_loss: Tensor) -> None:
    """Scales the rows of a gradient in place: see `backends.Backend`."""
    grad_loss, grad_loss_stride = flat(grad_loss.to(accumulate_dtype(grad_logits.dtype)))
    params = _row_params(grad_logits, None, None, TokenOptions(), grad_loss, grad_loss_stride, grad_logits)
    _C.cpu_scale_rows(isa(), params)


def isa() -> str:
    """The instruction set in use: the best of this machine, or `MIXCE_CPU_ISA` of the environment.

    Raises:
        RuntimeError: `MIXCE_CPU_ISA` names one that this machine does not run.
    """
    forced = os.environ.get("MIXCE_CPU_ISA")
    return _supported_isas()[0] if not forced else _checked_isa(forced)


@functools.cache
def _supported_isas() -> list[str]:
    return list(_C.supported_isas())


def _checked_isa(name: str) -> str:
    if name not in _supported_isas():
        raise RuntimeError(f"expected MIXCE_CPU_ISA to be one of {', '.join(_supported_isas())}, got {name!r}")
    return name


def _row_params(
    logits: Tensor,
    targets: Tensor | None,
    state: Tensor | None,
    options: TokenOptions,
    grad_loss: Tensor | None,
    grad_loss_stride: int,
    grad_logits: Tensor | None,
) -> _C.RowParams:
    rows = rows_of(logits)
    inplace = grad_logits is logits
    grad_rows = rows if grad_logits is None or inplace else rows_of(grad_logits)
    assert rows is not None, "logits must be rows that two strides reach"
    assert grad_rows is not None, "grad_logits must be rows that two strides reach"
    logits_layout = _C.RowLayout(rows.inner, rows.outer_stride, rows.inner_stride)
    grad_layout = (
        logits_layout
        if grad_rows == rows
        else _C.RowLayout(grad_rows.inner, grad_rows.outer_stride, grad_rows.inner_stride)
    )
    grad_bytes = logits.numel() * logits.element_size()
    return _C.RowParams(
        logits.data_ptr(),
        logits_layout,
        0 if targets is None else targets.data_ptr(),
        targets is not None and targets.dtype == torch.int64,
        rows.number,
        logits.shape[-1],
        _DTYPES[logits.dtype],
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
        max(1, min(torch.get_num_threads(), logits.numel() // _LOGITS_PER_THREAD)),
        not inplace and grad_bytes > _STREAM_BYTES,
    )
