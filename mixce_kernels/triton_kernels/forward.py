"""The forward kernel: the loss of each row of logits, and its gradient where asked for."""

from __future__ import annotations

import triton
import triton.language as tl

from mixce_kernels.triton_kernels.epilogue import (
    column_of,
    finish_ignored_row,
    finish_rows,
    mixture_of,
    upstream_of,
)
from mixce_kernels.triton_kernels.jit import kernel
from mixce_kernels.triton_kernels.mixce_math import coldness, grad_terms, transform_of
from mixce_kernels.triton_kernels.row_grad import fill_zeros, grad_held, grad_of, row_grad
from mixce_kernels.triton_kernels.row_layout import head_of, held_tiles, rest_of, row_offset, tile_index
from mixce_kernels.triton_kernels.row_stats import add_held, add_rest, add_steps, empty_lanes, exchange, merge_lanes


@triton.jit
def per_lane(terms, LANES: tl.constexpr):
    """A row's terms [CTAS, 1] for each lane [CTAS, 1, LANES, 1].

    The sum with a zero that Triton does not see through makes it change the layout of these few numbers, not of tiles.
    """
    zero = tl.minimum(tl.arange(0, LANES), 0)[None, :].to(terms[0].dtype)
    m, log2_sum, k, c, t = terms
    return (
        (m + zero)[:, None, :, None], (log2_sum + zero)[:, None, :, None], (k + zero)[:, None, :, None],
        (c + zero)[:, None, :, None], (t + zero)[:, None, :, None],
    )  # fmt: skip


@kernel
def forward_kernel(
    logits_ptr,  # [N, V] as rows
    targets_ptr,  # [N]
    eta_ptr,  # [N], where HAS_ETA
    parameters_ptr,  # [2, N], or None
    temperature_ptr,  # [N], or None
    loss_ptr,  # [N]
    state_ptr,  # [STATE_WIDTH, N], or None
    stats_ptr,  # [STATS_WIDTH, N], where STATS
    correct_ptr,  # [N], where STATS
    entropy_state_ptr,  # [ENTROPY_STATE_WIDTH, N], where STATS, or None
    token_scale_ptr,  # [N], where HAS_GRAD, or None
    grad_ptr,  # [N, V] as rows, where HAS_GRAD
    partial_ptr,  # [N, PARTIALS, CTAS], where CTAS > 1
    n_rows: tl.int64,
    vocab_size: tl.int32,
    n_steps: tl.int32,
    inner: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    grad_inner: tl.int32,
    grad_outer_stride: tl.int64,
    grad_inner_stride: tl.int64,
    eta_stride: tl.int64,
    token_scale_stride: tl.int64,
    ignore_index: tl.int64,
    eta_value: tl.float64,
    weighting: tl.int32,
    first: tl.float64,
    second: tl.float64,
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
    HELD: tl.constexpr,  # n_steps where the row stays in registers, else None
    CTAS: tl.constexpr,
    STACK: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    REST: tl.constexpr,
    PTX: tl.constexpr,
):
    """One program, or cluster of CTAS programs, a row: reads V logits, writes 6 numbers, and with HAS_GRAD V gradients.

    Pass 1 reads the row, the epilogue makes the token's terms, pass 2 reads the row again, from L2; with HELD it finds
    the row in registers.
    """
    STEP: tl.constexpr = CTAS * LANES * VECTOR
    BLOCK: tl.constexpr = STACK * STEP
    row = tl.program_id(0)
    results = (loss_ptr, state_ptr, stats_ptr, correct_ptr, entropy_state_ptr)
    target = tl.load(targets_ptr + row).to(tl.int64)
    if HAS_GRAD:
        grad_ptr += row_offset(row, grad_inner, grad_outer_stride, grad_inner_stride)
    if target == ignore_index:
        finish_ignored_row(results, n_rows, row, STATS)
        if HAS_GRAD:
            fill_zeros(grad_ptr, vocab_size, n_steps, 0, n_steps, CTAS, LANES, VECTOR, REST)
        return

    real: tl.constexpr = loss_ptr.dtype.element_ty
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row)
        factor = coldness(temperature)
        diff_scale, logit_scale = diff_scale * factor, logit_scale * factor
    transform = transform_of(diff_scale, cap, tanh_scale, real)
    logits_ptr += row_offset(row, inner, outer_stride, inner_stride)
    known, target_column = column_of(target, vocab_size)
    x_target = tl.load(logits_ptr + target_column, mask=known, other=0.0).to(real)

    # Pass 1.
    head = head_of(logits_ptr, VECTOR)
    rest, in_rest = rest_of(head, n_steps * STEP, vocab_size, (CTAS, REST // (CTAS * LANES), LANES, 1))
    x_rest = tl.load(logits_ptr + rest, mask=in_rest, other=float("-inf"))
    lanes = empty_lanes(CTAS, LANES, real)
    in_block = tile_index((CTAS, STACK, LANES, VECTOR))
    in_step = tile_index((CTAS, 1, LANES, VECTOR))
    if HELD is None:
        lanes = add_steps(
            lanes, logits_ptr, head, 0, n_steps, target_column, x_target, transform,
            SMOOTH, CAP, STATS, (CTAS, STACK, LANES, VECTOR),
        )  # fmt: skip
    else:
        N_BLOCKS: tl.constexpr = HELD // STACK
        body_ptr = tl.multiple_of(logits_ptr + head, 16)
        blocks = held_tiles(body_ptr, N_BLOCKS, (CTAS, STACK, LANES, VECTOR))
        steps = held_tiles(body_ptr + N_BLOCKS * BLOCK, HELD % STACK, (CTAS, 1, LANES, VECTOR))
        n_blocks = n_steps // STACK
        lanes, blocks = add_held(
            lanes, blocks, n_blocks, head, in_block, target_column, x_target, transform, SMOOTH, CAP, STATS, PTX
        )
        lanes, steps = add_held(
            lanes, steps, n_steps % STACK, head + N_BLOCKS * BLOCK, in_step, target_column, x_target, transform,
            SMOOTH, CAP, STATS, PTX,
        )  # fmt: skip
    lanes = add_rest(lanes, x_rest, rest, in_rest, target_column, x_target, transform, SMOOTH, CAP, STATS)
    lanes = merge_lanes(lanes, transform[0], SMOOTH, STATS)
    if CTAS > 1:
        lanes = exchange(lanes, partial_ptr, row, CTAS, LANES, SMOOTH, STATS)
        lanes = merge_lanes(lanes, transform[0], SMOOTH, STATS)

    # Epilogue.
    cta = tl.arange(0, CTAS)[:, None]
    mixture = mixture_of(eta_ptr, parameters_ptr, row, n_rows, eta_stride, eta_value, weighting, first, second, HAS_ETA)
    state = finish_rows(
        results, n_rows, row + 0 * cta, cta == 0, None, lanes, x_target, known, mixture, vocab_size, transform,
        (label_smoothing, z_loss), SMOOTH, CAP, STATS,
    )  # fmt: skip

    # Pass 2.
    if HAS_GRAD:
        upstream = upstream_of(None, token_scale_ptr, row, True, 0, token_scale_stride, real)
        if token_scale_ptr is None:
            # A number that the compiler knows to be 1 has it hold a row in more registers than there are.
            upstream += tl.minimum(n_rows, 0).to(real)
        terms = grad_terms(state, upstream, logit_scale)
        if HELD is None:
            row_grad(
                logits_ptr, grad_ptr, vocab_size, n_steps, 0, n_steps, target_column, terms, transform,
                CAP, SAME_WINDOW, STACK, LANES, VECTOR, REST,
            )  # fmt: skip
        else:
            terms = per_lane(terms, LANES)
            body_ptr = tl.multiple_of(grad_ptr + head, 16)
            ROTATED: tl.constexpr = CAP or SMOOTH or STATS
            grad_held(body_ptr, blocks, n_blocks, head, in_block, target_column, terms, transform, CAP, ROTATED, PTX)
            grad_held(
                body_ptr + N_BLOCKS * BLOCK, steps, n_steps % STACK, head + N_BLOCKS * BLOCK, in_step, target_column,
                terms, transform, CAP, ROTATED, PTX,
            )  # fmt: skip
            grad = grad_of(x_rest, 0, vocab_size, rest, target_column, terms, transform, CAP)
            tl.store(grad_ptr + rest, grad.to(dtype), mask=in_rest)
