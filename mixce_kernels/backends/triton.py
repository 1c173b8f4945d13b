"""The backend `triton`: launches the kernels of `triton_kernels`, imported by the first call that needs them."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mixce_kernels.backends.layout import RowLayout, aligned_alike, flat, reachable_layout
from mixce_kernels.backends.results import Results
from mixce_kernels.backends.triton_launch import VECTOR_BYTES, row_config, tile_config
from mixce_kernels.options import TokenOptions

_WARP_SIZE = 64 if torch.version.hip else 32
# Columns are counted in 31 bits, a block of them past a row's end included.
_MAX_VOCAB_SIZE = 2**30

checks_targets = False


def unavailable(logits: Tensor) -> str | None:
    """Why the Triton kernels cannot serve these logits."""
    if logits.device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1" and os.environ.get("MIXCE_CPU_TENSORS") != "1":
            return "it runs on CUDA and ROCm tensors (on the CPU under TRITON_INTERPRET=1), and the logits are on cpu"
    elif logits.device.type != "cuda":
        return f"it runs on CUDA and ROCm tensors, and the logits are on {logits.device}"
    if logits.shape[-1] > _MAX_VOCAB_SIZE:
        return f"it takes at most {_MAX_VOCAB_SIZE} logits a row, and these are {logits.shape[-1]}"
    return _import_problem()


def forward(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    eta: Tensor | None,  # [...]
    eta_value: float,
    options: TokenOptions,
    results: Results,
    grad_loss: Tensor | None,  # [...]
    grad_logits: Tensor | None,  # [..., V]
) -> None:
    """Loss, state and statistics, with the gradient where `grad_logits` is given: see `Backend`."""
    loss, state, stats, correct = results
    rows = reachable_layout(logits)
    if rows.number == 0:
        return
    has_grad = grad_logits is not None and grad_loss is not None
    out, grad_rows, same_window = _grad_layout(logits, rows, grad_logits)
    eta_entries, eta_stride = (loss, 0) if eta is None else flat(eta)
    upstream, upstream_stride = (loss, 0) if grad_loss is None else flat(grad_loss)
    vocab_size = logits.shape[-1]
    with_stats = results.with_stats
    with _device_of(logits):
        may_hold = has_grad and same_window
        arch = _arch() if may_hold else 0
        with_options = options.softcap is not None or options.label_smoothing > 0
        config = row_config(vocab_size, logits.element_size(), may_hold, with_stats, with_options, _WARP_SIZE, arch)
        partial = loss.new_empty((rows.number, 6, config.n_ctas)) if config.n_ctas > 1 else loss
        _forward_kernel()[(rows.number,)](
            logits,
            targets.contiguous(),
            eta_entries,
            loss,
            state,
            stats,
            correct,
            upstream,
            out,
            partial,
            rows.number,
            vocab_size,
            config.n_steps,
            rows.inner,
            rows.outer_stride,
            rows.inner_stride,
            grad_rows.inner,
            grad_rows.outer_stride,
            grad_rows.inner_stride,
            eta_stride,
            upstream_stride,
            options.ignore_index,
            eta_value,
            options.label_smoothing,
            options.z_loss,
            *_transform(options),
            HAS_ETA=eta is not None,
            HAS_GRAD=has_grad,
            CAP=options.softcap is not None,
            SMOOTH=options.label_smoothing > 0,
            STATS=with_stats,
            SAME_WINDOW=same_window,
            HELD=config.n_steps if config.held else None,
            CTAS=config.n_ctas,
            STACK=config.stack,
            LANES=config.lanes,
            VECTOR=config.vector,
            REST=config.rest,
            PTX=arch > 0,
            num_warps=config.num_warps,
            num_ctas=config.n_ctas,
            **({} if config.max_registers is None else {"maxnreg": config.max_registers}),
        )


def logits_grad(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    state: Tensor,  # [5, ...]
    grad_loss: Tensor,  # [...]
    options: TokenOptions,
    grad_logits: Tensor,  # [..., V]
) -> None:
    """The gradient from the state of the forward: see `Backend`."""
    rows = reachable_layout(logits)
    if rows.number == 0:
        return
    out, grad_rows, same_window = _grad_layout(logits, rows, grad_logits)
    upstream, upstream_stride = flat(grad_loss)
    vocab_size = logits.shape[-1]
    with_softcap = options.softcap is not None
    config = tile_config(rows.number, vocab_size, logits.element_size(), with_softcap, _WARP_SIZE)
    with _device_of(logits):
        _gradient_kernels().logits_grad_kernel[(rows.number * config.n_tiles,)](
            logits,
            targets.contiguous(),
            state.contiguous(),
            upstream,
            out,
            rows.number,
            vocab_size,
            config.n_steps,
            rows.inner,
            rows.outer_stride,
            rows.inner_stride,
            grad_rows.inner,
            grad_rows.outer_stride,
            grad_rows.inner_stride,
            upstream_stride,
            options.ignore_index,
            config.n_tiles,
            config.tile_steps,
            *_transform(options),
            CAP=with_softcap,
            SAME_WINDOW=same_window,
            STACK=config.stack,
            LANES=config.lanes,
            VECTOR=config.vector,
            REST=config.rest,
            num_warps=config.num_warps,
            **({} if config.max_registers is None else {"maxnreg": config.max_registers}),
        )


def scale_rows_(grad_logits: Tensor, grad_loss: Tensor) -> None:
    """Scales the rows of a gradient in place: see `Backend`."""
    rows = reachable_layout(grad_logits)
    if rows.number == 0:
        return
    upstream, upstream_stride = flat(grad_loss)
    vocab_size = grad_logits.shape[-1]
    config = tile_config(rows.number, vocab_size, grad_logits.element_size(), warp_size=_WARP_SIZE)
    with _device_of(grad_logits):
        _gradient_kernels().scale_rows_kernel[(rows.number * config.n_tiles,)](
            grad_logits,
            upstream,
            vocab_size,
            config.n_steps,
            rows.inner,
            rows.outer_stride,
            rows.inner_stride,
            upstream_stride,
            config.n_tiles,
            config.tile_steps,
            LANES=config.lanes,
            VECTOR=config.vector,
            REST=config.rest,
            num_warps=config.num_warps,
        )


@torch.compiler.assume_constant_result
def _import_problem() -> str | None:
    """Why there are no kernels; a compiler, which cannot look into Triton, takes it as it is."""
    try:
        _forward_kernel()
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return None


@functools.cache
def _forward_kernel() -> Any:
    from mixce_kernels.triton_kernels.forward import forward_kernel

    return forward_kernel


@functools.cache
def _gradient_kernels() -> ModuleType:
    from mixce_kernels.triton_kernels import gradient

    return gradient


def _arch() -> int:
    """NVIDIA's architecture that kernels are compiled for, 90 for sm_90; 0 elsewhere."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return 0
    from triton.runtime import driver

    target = driver.active.get_current_target()
    return int(target.arch) if target.backend == "cuda" else 0


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


def _grad_layout(logits: Tensor, rows: RowLayout, grad_logits: Tensor | None) -> tuple[Tensor, RowLayout, bool]:
    """The gradient, its rows, and whether each of them lies as its row of logits does to a 16-byte boundary."""
    if grad_logits is None or grad_logits is logits:
        return logits, rows, True
    grad_rows = reachable_layout(grad_logits)
    return grad_logits, grad_rows, aligned_alike(logits, rows, grad_logits, grad_rows, VECTOR_BYTES)


def _transform(options: TokenOptions) -> tuple[float, float, float, float]:
    """How logits become exponents.

    The scale of differences of (capped) logits, the cap, the scale inside of tanh, and the slope of it all: without a
    softcap the scale is applied to differences, which keeps the digits of logits near 1e5.
    """
    if options.softcap is None:
        return options.logit_scale, math.inf, 0.0, options.logit_scale
    return 1.0, options.softcap, options.logit_scale / options.softcap, options.logit_scale
