"""The forward from hidden states: statistics of tiles of logits, and the loss of each row from them."""

from __future__ import annotations

import triton
import triton.language as tl

from mixce_kernels.triton_kernels.epilogue import column_of, finish_rows, mixture_of
from mixce_kernels.triton_kernels.jit import bound, kernel
from mixce_kernels.triton_kernels.linear_tiles import logits_tile, rows_at
from mixce_kernels.triton_kernels.mixce_math import capped, finite, raise_maximum, transform_of
from mixce_kernels.triton_kernels.row_stats import sum_of_lanes

# Numbers that a split leaves of a row after m; where SMOOTH the third, where STATS the others: the largest logit, and
# whether the target is the first such.
SUM_EXP, X_TARGET, SUM_SHIFTED, SUM_EXP_SHIFTED, SUM_EXP_SQUARED, BEST, HIT = (tl.constexpr(i) for i in range(1, 8))
PARTIALS = tl.constexpr(8)


@triton.jit
def lanes_of_tile(z, in_columns, count, m, rate, SMOOTH: tl.constexpr, STATS: tl.constexpr):
    """The statistics of `count` columns of a tile [BLOCK_N, BLOCK_V], as in `row_stats.py` with a row for a lane.

    z is -inf outside of in_columns [1, BLOCK_V].
    """
    d = z - finite(m)[:, None]
    e = tl.exp2(d * rate)
    sum_exp = tl.sum(e, axis=1)
    sum_shifted, sum_exp_shifted, sum_exp_squared = sum_exp, sum_exp, sum_exp
    if SMOOTH:
        sum_shifted = tl.sum(tl.where(in_columns, d, 0.0), axis=1)
    if STATS:
        sum_exp_shifted = tl.sum(e * tl.maximum(d, -1e30), axis=1)
        sum_exp_squared = tl.sum(e * e, axis=1)
    return m, sum_exp, sum_shifted, sum_exp_shifted, sum_exp_squared, count, 0


@kernel
def linear_forward_kernel(
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V], where HAS_BIAS
    targets_ptr,  # [N]
    order_ptr,  # [N]
    n_valid_ptr,  # [1]
    partial_ptr,  # [n_splits, PARTIALS, N], by positions
    n_rows: tl.int64,
    vocab_size: tl.int32,
    depth: tl.int32,
    hidden_stride: tl.int64,
    weight_stride: tl.int64,
    n_row_blocks: tl.int32,
    n_splits: tl.int32,
    split_size: tl.int32,
    diff_scale: tl.float64,
    cap: tl.float64,
    tanh_scale: tl.float64,
    HAS_BIAS: tl.constexpr,
    CAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    STATS: tl.constexpr,
    EVEN: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program a block of rows and a split of the vocabulary: Pass 1 over its tiles.

    For each tile it reads BLOCK_N rows of hidden and BLOCK_V rows of weight, which the GROUP of programs that run at a
    time share in L2. Writes 3 numbers a row and split, up to 8 with options.
    """
    program = tl.program_id(0)
    block, split = tl.swizzle2d(program // n_splits, program % n_splits, n_row_blocks, n_splits, GROUP)
    n_valid = tl.load(n_valid_ptr).to(tl.int32)
    if block * BLOCK_N >= n_valid:
        return

    real: tl.constexpr = partial_ptr.dtype.element_ty
    transform = transform_of(diff_scale, cap, tanh_scale, real)
    row, in_rows = rows_at(order_ptr, n_valid, block * BLOCK_N, BLOCK_N)
    # 32 bits: comparisons with a tile's columns take half the registers. No column for a target that is none.
    target = column_of(tl.load(targets_ptr + row).to(tl.int64), vocab_size)[1]
    hidden_rows = hidden_ptr + row * hidden_stride
    zeros = tl.zeros((BLOCK_N,), real)
    # The count is that of every row: a number.
    lanes = (zeros - float("inf"), zeros, zeros, zeros, zeros, tl.full((), 0.0, real), 0)
    x_target = zeros
    best = zeros - float("inf")
    hit = tl.zeros((BLOCK_N,), tl.int32)

    end = tl.minimum((split + 1) * split_size, vocab_size)
    for first in range(bound(split * split_size), bound(end), BLOCK_V):
        weight_row = tl.minimum(first + tl.arange(0, BLOCK_V), vocab_size - 1).to(tl.int64)
        x = logits_tile(
            hidden_rows, weight_ptr + weight_row * weight_stride, bias_ptr + weight_row, depth,
            real, HAS_BIAS, EVEN, VECTOR, BLOCK_D,
        )  # fmt: skip
        # Columns and the target's are counted from the tile's first.
        i = tl.arange(0, BLOCK_V)[None, :]
        in_columns = i < end - first
        target_i = target - first
        x_target += tl.sum(tl.where(i == target_i[:, None], x, 0.0), axis=1)
        z = x
        if CAP:
            z, _ = capped(x, transform)
        z = tl.where(in_columns, z, float("-inf"))
        m = tl.maximum(lanes[0], tl.max(z, axis=1))
        count = tl.minimum(end - first, BLOCK_V).to(real)
        tile = lanes_of_tile(z, in_columns, count, m, transform[0], SMOOTH, STATS)
        lanes = sum_of_lanes(raise_maximum(lanes, m, transform[0], SMOOTH, STATS), tile, SMOOTH, STATS)
        if STATS:
            x = tl.where(in_columns, x, float("-inf"))
            tile_best = tl.max(x, axis=1)
            first_best = tl.min(tl.where(x == tile_best[:, None], i, BLOCK_V), axis=1)
            hit = tl.where(tile_best > best, (first_best == target_i).to(tl.int32), hit)
            best = tl.maximum(best, tile_best)

    position = block * BLOCK_N + tl.arange(0, BLOCK_N)
    partial_ptr += split * PARTIALS * n_rows + position
    tl.store(partial_ptr, lanes[0], mask=in_rows)
    tl.store(partial_ptr + SUM_EXP * n_rows, lanes[1], mask=in_rows)
    tl.store(partial_ptr + X_TARGET * n_rows, x_target, mask=in_rows)
    if SMOOTH:
        tl.store(partial_ptr + SUM_SHIFTED * n_rows, lanes[2], mask=in_rows)
    if STATS:
        tl.store(partial_ptr + SUM_EXP_SHIFTED * n_rows, lanes[3], mask=in_rows)
        tl.store(partial_ptr + SUM_EXP_SQUARED * n_rows, lanes[4], mask=in_rows)
        tl.store(partial_ptr + BEST * n_rows, best, mask=in_rows)
        tl.store(partial_ptr + HIT * n_rows, hit.to(real), mask=in_rows)


@kernel
def linear_merge_kernel(
    partial_ptr,  # [n_splits, PARTIALS, N], by positions
    targets_ptr,  # [N]
    order_ptr,  # [N]
    n_valid_ptr,  # [1]
    eta_ptr,  # [N], where HAS_ETA
    parameters_ptr,  # [2, N], or None
    loss_ptr,  # [N]
    state_ptr,  # [STATE_WIDTH, N]
    stats_ptr,  # [STATS_WIDTH, N], where STATS
    correct_ptr,  # [N], where STATS
    n_rows: tl.int64,
    vocab_size: tl.int32,
    n_splits: tl.int32,
    split_size: tl.int32,
    eta_stride: tl.int64,
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
    SPLITS: tl.constexpr,  # n_splits, or the next power of two
    ROWS: tl.constexpr,
):
    """ROWS positions a program: merges their splits, and writes 6 numbers a row (13 with STATS), 0 where ignored."""
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n_valid = tl.load(n_valid_ptr).to(tl.int32)
    in_rows = position < n_rows
    valid = position < n_valid
    row = tl.load(order_ptr + position, mask=in_rows, other=0).to(tl.int64)
    target = tl.load(targets_ptr + row).to(tl.int64)

    real: tl.constexpr = partial_ptr.dtype.element_ty
    transform = transform_of(diff_scale, cap, tanh_scale, real)
    split = tl.arange(0, SPLITS)[:, None]
    partial_ptr += split * (PARTIALS * n_rows) + position[None, :]
    filled = (split < n_splits) & valid[None, :]
    m_split = tl.load(partial_ptr, mask=filled, other=float("-inf"))
    sum_exp = tl.load(partial_ptr + SUM_EXP * n_rows, mask=filled, other=0.0)
    x_target = tl.sum(tl.load(partial_ptr + X_TARGET * n_rows, mask=filled, other=0.0), axis=0)
    sum_shifted, sum_exp_shifted, sum_exp_squared, count = sum_exp, sum_exp, sum_exp, sum_exp
    if SMOOTH:
        sum_shifted = tl.load(partial_ptr + SUM_SHIFTED * n_rows, mask=filled, other=0.0)
        size = tl.minimum(vocab_size - split * split_size, split_size)
        count = tl.where(filled, size, 0).to(real)
    if STATS:
        sum_exp_shifted = tl.load(partial_ptr + SUM_EXP_SHIFTED * n_rows, mask=filled, other=0.0)
        sum_exp_squared = tl.load(partial_ptr + SUM_EXP_SQUARED * n_rows, mask=filled, other=0.0)
    m = tl.max(m_split, axis=0)
    lanes = (m_split, sum_exp, sum_shifted, sum_exp_shifted, sum_exp_squared, count, count)
    _, sum_exp, sum_shifted, sum_exp_shifted, sum_exp_squared, count, _ = raise_maximum(
        lanes, m[None, :], transform[0], SMOOTH, STATS
    )
    sum_exp = tl.sum(sum_exp, axis=0)
    beaten = sum_exp
    if SMOOTH:
        sum_shifted = tl.sum(sum_shifted, axis=0)
    if STATS:
        sum_exp_shifted = tl.sum(sum_exp_shifted, axis=0)
        sum_exp_squared = tl.sum(sum_exp_squared, axis=0)
        best = tl.load(partial_ptr + BEST * n_rows, mask=filled, other=float("-inf"))
        hit = tl.load(partial_ptr + HIT * n_rows, mask=filled, other=0.0)
        # The first of the splits that have the largest logit.
        best_split = tl.min(tl.where(best == tl.max(best, axis=0)[None, :], split, SPLITS), axis=0)
        beaten = 1.0 - tl.sum(tl.where(split == best_split[None, :], hit, 0.0), axis=0)

    # Epilogue.
    known, _ = column_of(target, vocab_size)
    mixture = mixture_of(eta_ptr, parameters_ptr, row, n_rows, eta_stride, eta_value, weighting, first, second, HAS_ETA)
    lanes = (m, sum_exp, sum_shifted, sum_exp_shifted, sum_exp_squared, count, beaten)
    finish_rows(
        (loss_ptr, state_ptr, stats_ptr, correct_ptr, None), n_rows, row, in_rows, valid, lanes, x_target, known,
        mixture, vocab_size, transform, (label_smoothing, z_loss), SMOOTH, CAP, STATS,
    )  # fmt: skip
