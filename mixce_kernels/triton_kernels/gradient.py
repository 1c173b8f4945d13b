"""The kernels without a sum over the row: the gradient, and the scaling of a gradient's rows."""

from __future__ import annotations

import triton
import triton.language as tl

from mixce_kernels.triton_kernels.epilogue import column_of, upstream_of
from mixce_kernels.triton_kernels.jit import bound, kernel
from mixce_kernels.triton_kernels.mixce_math import (
    ENTROPY_STATE_WIDTH,
    STATE_WIDTH,
    coldness,
    grad_terms,
    transform_of,
    with_entropy,
)
from mixce_kernels.triton_kernels.row_grad import fill_zeros, row_grad
from mixce_kernels.triton_kernels.row_layout import head_of, rest_of, row_offset, tile_index


@triton.jit
def broadcast(values, i: tl.constexpr):
    """Entry i of values [32]."""
    return tl.sum(tl.where(tl.arange(0, 32) == i, values, 0), axis=0)


@kernel
def logits_grad_kernel(
    logits_ptr,  # [N, V] as rows
    targets_ptr,  # [N]
    state_ptr,  # [STATE_WIDTH, N]
    grad_loss_ptr,  # [N], or None
    token_scale_ptr,  # [N], or None
    temperature_ptr,  # [N], or None
    grad_entropy_ptr,  # [N], or None
    entropy_state_ptr,  # [ENTROPY_STATE_WIDTH, N], or None
    grad_ptr,  # [N, V] as rows
    n_rows: tl.int64,
    vocab_size: tl.int32,
    n_steps: tl.int32,
    inner: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    grad_inner: tl.int32,
    grad_outer_stride: tl.int64,
    grad_inner_stride: tl.int64,
    grad_loss_stride: tl.int64,
    token_scale_stride: tl.int64,
    ignore_index: tl.int64,
    n_tiles: tl.int32,
    tile_steps: tl.int32,
    diff_scale: tl.float64,
    cap: tl.float64,
    tanh_scale: tl.float64,
    logit_scale: tl.float64,
    CAP: tl.constexpr,
    SAME_WINDOW: tl.constexpr,
    STACK: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    REST: tl.constexpr,
):
    """One program a tile of a row: reads and writes each of its logits once.

    Rows are taken in the reverse of the forward's order: its last rows may still be in L2.
    """
    program = tl.program_id(0)
    row = (n_rows - 1 - program // n_tiles).to(tl.int32)
    first_step = program % n_tiles * tile_steps
    end_step = tl.minimum(first_step + tile_steps, n_steps)
    target = tl.load(targets_ptr + row).to(tl.int64)
    grad_ptr += row_offset(row, grad_inner, grad_outer_stride, grad_inner_stride)
    if target == ignore_index:
        fill_zeros(grad_ptr, vocab_size, n_steps, first_step, end_step, 1, LANES, VECTOR, REST)
        return

    real: tl.constexpr = state_ptr.dtype.element_ty
    # A scalar is loaded by every thread; of these vectors each warp loads an entry a thread, and broadcasts it.
    i = tl.arange(0, 32)
    values = tl.load(state_ptr + row + i * n_rows, mask=i < STATE_WIDTH, other=0.0)
    upstream = upstream_of(
        grad_loss_ptr, token_scale_ptr, row + 0 * i, i == 0, grad_loss_stride, token_scale_stride, real
    )
    state = (
        broadcast(values, 0),
        broadcast(values, 1),
        broadcast(values, 2),
        broadcast(values, 3),
        broadcast(values, 4),
    )
    if temperature_ptr is not None:
        temperature = broadcast(tl.load(temperature_ptr + row + 0 * i, mask=i == 0, other=0.0), 0)
        factor = coldness(temperature)
        diff_scale, logit_scale = diff_scale * factor, logit_scale * factor
    terms = grad_terms(state, broadcast(upstream, 0), logit_scale)
    if grad_entropy_ptr is not None:
        values = tl.load(entropy_state_ptr + row + i * n_rows, mask=i < ENTROPY_STATE_WIDTH, other=0.0)
        grad_entropy = broadcast(tl.load(grad_entropy_ptr + row + 0 * i, mask=i == 0, other=0.0), 0).to(real)
        entropy_state = (broadcast(values, 0), broadcast(values, 1))
        terms = with_entropy(terms, entropy_state, grad_entropy, logit_scale, diff_scale)
    transform = transform_of(diff_scale, cap, tanh_scale, real)
    target_column = column_of(target, vocab_size)[1]
    logits_ptr += row_offset(row, inner, outer_stride, inner_stride)
    row_grad(
        logits_ptr, grad_ptr, vocab_size, n_steps, first_step, end_step, target_column, terms, transform,
        CAP, SAME_WINDOW, STACK, LANES, VECTOR, REST,
    )  # fmt: skip


@kernel
def scale_rows_kernel(
    grad_ptr,  # [N, V] as rows
    grad_loss_ptr,  # [N]
    targets_ptr,  # [N], or None
    vocab_size: tl.int32,
    n_steps: tl.int32,
    inner: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    grad_loss_stride: tl.int64,
    ignore_index: tl.int64,
    n_tiles: tl.int32,
    tile_steps: tl.int32,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    REST: tl.constexpr,
):
    """One program a tile of a row: reads and writes it, or nothing where it is ignored or its factor is 1."""
    STEP: tl.constexpr = LANES * VECTOR
    program = tl.program_id(0)
    row = program // n_tiles
    first_step = program % n_tiles * tile_steps
    end_step = tl.minimum(first_step + tile_steps, n_steps)
    factor = tl.load(grad_loss_ptr + row * grad_loss_stride)
    if targets_ptr is not None:
        # NaN or infinity must not multiply the zeros of an ignored row.
        factor = tl.where(tl.load(targets_ptr + row).to(tl.int64) == ignore_index, 1.0, factor)
    if factor == 1.0:
        return
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    factor = factor.to(tl.float64 if dtype == tl.float64 else tl.float32)
    grad_ptr += row_offset(row, inner, outer_stride, inner_stride)
    head = head_of(grad_ptr, VECTOR)
    body_ptr = tl.multiple_of(grad_ptr + head, 16)
    for step in range(bound(first_step), bound(end_step)):
        step_ptr = body_ptr + step * STEP + tile_index((1, 1, LANES, VECTOR))
        grad = tl.load(step_ptr).to(factor.dtype) * factor
        tl.store(step_ptr, grad.to(dtype), cache_modifier=".cs")
    if end_step == n_steps:
        rest, in_rest = rest_of(head, n_steps * STEP, vocab_size, (1, REST // LANES, LANES, 1))
        grad = tl.load(grad_ptr + rest, mask=in_rest).to(factor.dtype) * factor
        tl.store(grad_ptr + rest, grad.to(dtype), mask=in_rest)
