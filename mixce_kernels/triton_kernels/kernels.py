"""The kernels: forward (with the gradient where asked for), gradient, and scaling of a gradient's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from mixce_kernels.triton_kernels.math import capped, token_terms
from mixce_kernels.triton_kernels.rows import (
    add_logits,
    edges_of,
    empty_lanes,
    fill_zeros,
    grad_at_target,
    grad_of,
    grad_terms,
    merge_lanes,
    row_begin,
    row_grad,
    tile_of,
    window_of,
)


def _kernel(function: Callable[..., None]) -> Any:
    """`triton.jit` for runtime values that stay runtime: no new size, stride, option or address compiles anew."""
    code = function.__code__
    runtime = [name for name in code.co_varnames[: code.co_argcount] if not name.isupper()]
    return triton.jit(function, do_not_specialize=runtime, do_not_specialize_on_alignment=runtime)


@triton.jit
def as_real(value, dtype: tl.constexpr):
    """A float argument as a scalar of `dtype`; the interpreter hands it over as a Python number, which has no `.to`."""
    return (value + tl.full((), 0.0, dtype)).to(dtype)


@_kernel
def forward_kernel(
    logits_ptr,  # [N, V] as rows
    targets_ptr,  # [N]
    eta_ptr,  # [N], where HAS_ETA
    loss_ptr,  # [N]
    state_ptr,  # [5, N]
    stats_ptr,  # [5, N], where STATS
    correct_ptr,  # [N], where STATS
    grad_loss_ptr,  # [N], where HAS_GRAD
    grad_ptr,  # [N, V] as rows, where HAS_GRAD
    n_rows: tl.int64,
    vocab_size: tl.int32,
    inner: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    grad_inner: tl.int32,
    grad_outer_stride: tl.int64,
    grad_inner_stride: tl.int64,
    eta_stride: tl.int64,
    grad_loss_stride: tl.int64,
    ignore_index: tl.int64,
    eta_value: tl.float64,
    label_smoothing: tl.float64,
    z_loss: tl.float64,
    diff_scale: tl.float64,
    cap: tl.float64,
    tanh_scale: tl.float64,
    logit_scale: tl.float64,
    HAS_ETA: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    CAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    STATS: tl.constexpr,
    SAME_WINDOW: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    STACK: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One program a row: reads V logits, writes 6 numbers, and with HAS_GRAD V gradients.

    Pass 1 reads the row, the epilogue makes the token's terms, pass 2 reads the row again, from L2; with ONE_BLOCK
    it finds the row in registers.
    """
    STEP: tl.constexpr = LANES * VECTOR
    BLOCK: tl.constexpr = STACK * STEP
    row = tl.program_id(0)
    loss_ptr += row
    state_ptr += row
    stats_ptr += row
    correct_ptr += row
    target = tl.load(targets_ptr + row).to(tl.int64)
    if HAS_GRAD:
        grad_ptr += row_begin(row, grad_inner, grad_outer_stride, grad_inner_stride)
    if target == ignore_index:
        tl.store(loss_ptr, 0.0)
        for i in tl.static_range(5):
            tl.store(state_ptr + i * n_rows, 0.0)
        if STATS:
            for i in tl.static_range(5):
                tl.store(stats_ptr + i * n_rows, 0.0)
            tl.store(correct_ptr, False)
        if HAS_GRAD:
            fill_zeros(grad_ptr, vocab_size, 0, vocab_size + VECTOR, STEP, VECTOR)
        return

    real: tl.constexpr = loss_ptr.dtype.element_ty
    diff_scale = as_real(diff_scale, tl.float64)
    rate = (diff_scale * 1.4426950408889634).to(real)
    transform = (rate, as_real(cap, real), as_real(tanh_scale, real))
    logits_ptr += row_begin(row, inner, outer_stride, inner_stride)
    known = (target >= 0) & (target < vocab_size)
    target_column = tl.where(known, target, -1).to(tl.int32)
    x_target = tl.load(logits_ptr + target_column, mask=known, other=0.0).to(real)

    # Pass 1. The lanes begin with the edges.
    window = window_of(logits_ptr, vocab_size, VECTOR)
    lead, body_begin, body_end = window
    window_ptr = tl.multiple_of(logits_ptr - lead, 16)
    offsets, in_edges = edges_of(window, vocab_size, VECTOR, LANES)
    x_edges = tl.load(window_ptr + offsets, mask=in_edges, other=float("-inf"))
    lanes = add_logits(
        empty_lanes(LANES, real), x_edges, offsets - lead, in_edges, target_column, x_target, transform,
        SMOOTH, CAP, STATS, (1, LANES, 1),
    )  # fmt: skip
    begin, size = tile_of(body_begin, body_end, 0, vocab_size + VECTOR, VECTOR)
    body_ptr = window_ptr + begin
    columns = begin - lead + tl.arange(0, BLOCK)
    if ONE_BLOCK:
        in_body = tl.arange(0, BLOCK) < size
        x = tl.load(body_ptr + tl.arange(0, BLOCK), mask=in_body, other=float("-inf"))
        lanes = add_logits(
            lanes, x, columns, in_body, target_column, x_target, transform,
            SMOOTH, CAP, STATS, (STACK, LANES, VECTOR),
        )  # fmt: skip
    else:
        n_blocks = size // BLOCK
        for block in range(n_blocks):
            x = tl.load(body_ptr + block * BLOCK + tl.arange(0, BLOCK))
            lanes = add_logits(
                lanes, x, columns + block * BLOCK, None, target_column, x_target, transform,
                SMOOTH, CAP, STATS, (STACK, LANES, VECTOR),
            )  # fmt: skip
        i = tl.arange(0, STEP)
        for step in range(n_blocks * STACK, tl.cdiv(size, STEP)):
            valid = i < size - step * STEP
            x = tl.load(body_ptr + step * STEP + i, mask=valid, other=float("-inf"))
            lanes = add_logits(
                lanes, x, begin - lead + step * STEP + i, valid, target_column, x_target, transform,
                SMOOTH, CAP, STATS, (1, LANES, VECTOR),
            )  # fmt: skip

    # Epilogue.
    m, sum_exp, sum_shifted, sum_exp_shifted, beaten = merge_lanes(lanes, rate, SMOOTH, STATS)
    s = tl.where(known, tl.log(sum_exp), float("nan")).to(tl.float64)
    mean_shifted = tl.full((), 0.0, tl.float64)
    if SMOOTH:
        mean_shifted = diff_scale * (sum_shifted.to(tl.float64) / vocab_size)
    z_target = x_target
    if CAP:
        z_target, _ = capped(x_target, transform[1], transform[2])
    eta = as_real(eta_value, tl.float64)
    if HAS_ETA:
        eta = tl.load(eta_ptr + row * eta_stride).to(tl.float64)
    loss, nll, q, weight, lse, a, c, t = token_terms(
        diff_scale * m, s, diff_scale * (z_target.to(tl.float64) - m), mean_shifted, eta, vocab_size,
        as_real(label_smoothing, tl.float64), as_real(z_loss, tl.float64), real,
    )  # fmt: skip
    tl.store(loss_ptr, loss)
    tl.store(state_ptr, m)
    tl.store(state_ptr + n_rows, s)
    tl.store(state_ptr + 2 * n_rows, a)
    tl.store(state_ptr + 3 * n_rows, c)
    tl.store(state_ptr + 4 * n_rows, t)
    if STATS:
        tl.store(stats_ptr, nll)
        tl.store(stats_ptr + n_rows, q)
        tl.store(stats_ptr + 2 * n_rows, weight)
        tl.store(stats_ptr + 3 * n_rows, lse)
        tl.store(stats_ptr + 4 * n_rows, s - diff_scale * (sum_exp_shifted / sum_exp))
        tl.store(correct_ptr, (beaten == 0) & (nll == nll))

    # Pass 2.
    if HAS_GRAD:
        grad_loss = tl.load(grad_loss_ptr + row * grad_loss_stride).to(real)
        state = (m, s.to(real), a.to(real), c.to(real), t.to(real))
        terms = grad_terms(state, grad_loss, as_real(logit_scale, real))
        if ONE_BLOCK:
            dtype: tl.constexpr = grad_ptr.dtype.element_ty
            grad_ptr = tl.multiple_of(grad_ptr - lead, 16)
            tl.store(grad_ptr + offsets, grad_of(x_edges, terms, transform, CAP).to(dtype), mask=in_edges)
            grad = grad_of(x, terms, transform, CAP).to(dtype)
            tl.store(grad_ptr + begin + tl.arange(0, BLOCK), grad, mask=in_body, cache_modifier=".cs")
            tl.debug_barrier()
            at_target = grad_at_target(x_target, terms, transform, CAP)
            tl.store(grad_ptr + lead + target_column, at_target.to(dtype), mask=known)
        else:
            row_grad(
                logits_ptr, grad_ptr, vocab_size, 0, vocab_size + VECTOR, target_column, terms, transform,
                CAP, SAME_WINDOW, BLOCK, STEP, VECTOR,
            )  # fmt: skip


@_kernel
def logits_grad_kernel(
    logits_ptr,  # [N, V] as rows
    targets_ptr,  # [N]
    state_ptr,  # [5, N]
    grad_loss_ptr,  # [N]
    grad_ptr,  # [N, V] as rows
    n_rows: tl.int64,
    vocab_size: tl.int32,
    inner: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    grad_inner: tl.int32,
    grad_outer_stride: tl.int64,
    grad_inner_stride: tl.int64,
    grad_loss_stride: tl.int64,
    ignore_index: tl.int64,
    n_tiles: tl.int32,
    tile_size: tl.int32,
    diff_scale: tl.float64,
    cap: tl.float64,
    tanh_scale: tl.float64,
    logit_scale: tl.float64,
    CAP: tl.constexpr,
    SAME_WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One program a tile of a row: reads and writes each of its logits once.

    Rows are taken in the reverse of the forward's order: its last rows may still be in L2.
    """
    program = tl.program_id(0)
    row = (n_rows - 1 - program // n_tiles).to(tl.int32)
    tile = program % n_tiles
    target = tl.load(targets_ptr + row).to(tl.int64)
    grad_ptr += row_begin(row, grad_inner, grad_outer_stride, grad_inner_stride)
    if target == ignore_index:
        fill_zeros(grad_ptr, vocab_size, tile, tile_size, STEP, VECTOR)
        return

    real: tl.constexpr = state_ptr.dtype.element_ty
    state_ptr += row
    m = tl.load(state_ptr)
    s = tl.load(state_ptr + n_rows)
    a = tl.load(state_ptr + 2 * n_rows)
    c = tl.load(state_ptr + 3 * n_rows)
    t = tl.load(state_ptr + 4 * n_rows)
    grad_loss = tl.load(grad_loss_ptr + row * grad_loss_stride).to(real)
    terms = grad_terms((m, s, a, c, t), grad_loss, as_real(logit_scale, real))
    rate = (as_real(diff_scale, tl.float64) * 1.4426950408889634).to(real)
    transform = (rate, as_real(cap, real), as_real(tanh_scale, real))
    known = (target >= 0) & (target < vocab_size)
    target_column = tl.where(known, target, -1).to(tl.int32)
    logits_ptr += row_begin(row, inner, outer_stride, inner_stride)
    row_grad(
        logits_ptr, grad_ptr, vocab_size, tile, tile_size, target_column, terms, transform,
        CAP, SAME_WINDOW, BLOCK, STEP, VECTOR,
    )  # fmt: skip


@_kernel
def scale_rows_kernel(
    grad_ptr,  # [N, V] as rows
    grad_loss_ptr,  # [N]
    vocab_size: tl.int32,
    inner: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    grad_loss_stride: tl.int64,
    n_tiles: tl.int32,
    tile_size: tl.int32,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One program a tile of a row: reads and writes it, or nothing where the row's factor is 1."""
    program = tl.program_id(0)
    row = program // n_tiles
    tile = program % n_tiles
    factor = tl.load(grad_loss_ptr + row * grad_loss_stride)
    if factor == 1.0:
        return
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    factor = factor.to(tl.float64 if dtype == tl.float64 else tl.float32)
    grad_ptr += row_begin(row, inner, outer_stride, inner_stride)
    window = window_of(grad_ptr, vocab_size, VECTOR)
    lead, body_begin, body_end = window
    grad_ptr = tl.multiple_of(grad_ptr - lead, 16)
    if tile == 0:
        offsets, in_edges = edges_of(window, vocab_size, VECTOR, 2 * VECTOR)
        edges = tl.load(grad_ptr + offsets, mask=in_edges).to(factor.dtype) * factor
        tl.store(grad_ptr + offsets, edges.to(dtype), mask=in_edges)
    begin, size = tile_of(body_begin, body_end, tile, tile_size, VECTOR)
    i = tl.arange(0, BLOCK)
    for block in range(tl.cdiv(size, BLOCK)):
        block_ptr = grad_ptr + begin + block * BLOCK + i
        valid = i < size - block * BLOCK
        grad = tl.load(block_ptr, mask=valid).to(factor.dtype) * factor
        tl.store(block_ptr, grad.to(dtype), mask=valid, cache_modifier=".cs")
