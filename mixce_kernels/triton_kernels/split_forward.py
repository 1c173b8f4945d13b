"""The forward of rows too few for a program each: programs that share a row leave partial statistics, which merge."""

from __future__ import annotations

import triton.language as tl

from mixce_kernels.triton_kernels.epilogue import column_of, finish_ignored_row, finish_rows, mixture_of
from mixce_kernels.triton_kernels.jit import kernel
from mixce_kernels.triton_kernels.mixce_math import transform_of
from mixce_kernels.triton_kernels.row_layout import head_of, rest_of, row_offset
from mixce_kernels.triton_kernels.row_stats import (
    PARTIALS,
    add_rest,
    add_steps,
    empty_lanes,
    load_partials,
    merge_lanes,
    store_partials,
)


@kernel
def partial_stats_kernel(
    logits_ptr,  # [N, V] as rows
    targets_ptr,  # [N]
    partial_ptr,  # [N, PARTIALS, n_tiles]
    vocab_size: tl.int32,
    n_steps: tl.int32,
    inner: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    ignore_index: tl.int64,
    n_tiles: tl.int32,
    tile_steps: tl.int32,
    diff_scale: tl.float64,
    cap: tl.float64,
    tanh_scale: tl.float64,
    CAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    STATS: tl.constexpr,
    STACK: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    REST: tl.constexpr,
):
    """One program a tile of a row: pass 1, which reads each of its logits once."""
    program = tl.program_id(0)
    row = program // n_tiles
    tile = program % n_tiles
    target = tl.load(targets_ptr + row).to(tl.int64)
    if target == ignore_index:
        return

    real: tl.constexpr = partial_ptr.dtype.element_ty
    transform = transform_of(diff_scale, cap, tanh_scale, real)
    logits_ptr += row_offset(row, inner, outer_stride, inner_stride)
    known, target_column = column_of(target, vocab_size)
    x_target = tl.load(logits_ptr + target_column, mask=known, other=0.0).to(real)
    first_step = tile * tile_steps
    end_step = tl.minimum(first_step + tile_steps, n_steps)
    head = head_of(logits_ptr, VECTOR)
    lanes = add_steps(
        empty_lanes(1, LANES, real), logits_ptr, head, first_step, end_step, target_column, x_target, transform,
        SMOOTH, CAP, STATS, (1, STACK, LANES, VECTOR),
    )  # fmt: skip
    if end_step == n_steps:
        rest, in_rest = rest_of(head, n_steps * LANES * VECTOR, vocab_size, (1, REST // LANES, LANES, 1))
        x_rest = tl.load(logits_ptr + rest, mask=in_rest, other=float("-inf"))
        lanes = add_rest(lanes, x_rest, rest, in_rest, target_column, x_target, transform, SMOOTH, CAP, STATS)
    lanes = merge_lanes(lanes, transform[0], SMOOTH, STATS)
    partial_ptr += row.to(tl.int64) * (PARTIALS * n_tiles) + tile
    store_partials(lanes, partial_ptr + tl.zeros((1, 1), tl.int32), n_tiles, SMOOTH, STATS)


@kernel
def merge_kernel(
    logits_ptr,  # [N, V] as rows
    targets_ptr,  # [N]
    eta_ptr,  # [N], where HAS_ETA
    parameters_ptr,  # [2, N], or None
    loss_ptr,  # [N]
    state_ptr,  # [STATE_WIDTH, N], or None
    stats_ptr,  # [STATS_WIDTH, N], where STATS
    correct_ptr,  # [N], where STATS
    partial_ptr,  # [N, PARTIALS, n_tiles]
    n_rows: tl.int64,
    vocab_size: tl.int32,
    inner: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    eta_stride: tl.int64,
    ignore_index: tl.int64,
    n_tiles: tl.int32,
    eta_value: tl.float64,
    weighting: tl.int32,
    first: tl.float64,
    second: tl.float64,
    label_smoothing: tl.float64,
    z_loss: tl.float64,
    diff_scale: tl.float64,
    cap: tl.float64,
    tanh_scale: tl.float64,
    HAS_ETA: tl.constexpr,
    CAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    STATS: tl.constexpr,
    TILES: tl.constexpr,  # n_tiles, or a power of two beyond
):
    """One program a row: merges what the programs of its tiles left, in their order, and writes 6 numbers."""
    row = tl.program_id(0)
    results = (loss_ptr, state_ptr, stats_ptr, correct_ptr, None)
    target = tl.load(targets_ptr + row).to(tl.int64)
    if target == ignore_index:
        finish_ignored_row(results, n_rows, row, STATS)
        return

    real: tl.constexpr = loss_ptr.dtype.element_ty
    transform = transform_of(diff_scale, cap, tanh_scale, real)
    logits_ptr += row_offset(row, inner, outer_stride, inner_stride)
    known, target_column = column_of(target, vocab_size)
    x_target = tl.load(logits_ptr + target_column, mask=known, other=0.0).to(real)
    partial_ptr += row.to(tl.int64) * (PARTIALS * n_tiles)
    lanes = load_partials(partial_ptr, n_tiles, tl.arange(0, TILES)[None, :], SMOOTH, STATS)
    lanes = merge_lanes(lanes, transform[0], SMOOTH, STATS)
    mixture = mixture_of(eta_ptr, parameters_ptr, row, n_rows, eta_stride, eta_value, weighting, first, second, HAS_ETA)
    finish_rows(
        results, n_rows, row + tl.zeros((1, 1), tl.int32), tl.full((1, 1), True, tl.int1), None, lanes, x_target, known,
        mixture, vocab_size, transform, (label_smoothing, z_loss), SMOOTH, CAP, STATS,
    )  # fmt: skip
