"""The gradients by hidden states, weight and bias, a span of the vocabulary at a time.

A scratch holds a span of the gradient by logits, in the operands' type: [NP, SPAN], where NP is N rounded up to whole
blocks of rows. Its rows are positions (see `linear_tiles.py`); what lies past the last position or column is 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mixce_kernels.triton_kernels.jit import bound, kernel
from mixce_kernels.triton_kernels.linear_tiles import (
    columns_at,
    grad_of_tile,
    load_depth,
    logits_tile,
    operand,
    rounded,
    rows_at,
    terms_at,
)
from mixce_kernels.triton_kernels.mixce_math import transform_of


@triton.jit
def scratch_tile(scratch_ptr, position, column, SPAN, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Addresses of a tile [ROWS, COLUMNS] of a scratch, whose rows are whole vectors."""
    # A loop's index is a Python number to the interpreter, which has no `.to`.
    tile_ptr = scratch_ptr + (tl.full((), 0, tl.int64) + position) * SPAN + column
    # SPAN is a multiple of 16, which the compiler cannot know.
    i = tl.arange(0, ROWS)[:, None] * (SPAN // 16 * 16) + tl.arange(0, COLUMNS)[None, :]
    return tl.multiple_of(tile_ptr + i, (1, 16))


@triton.jit
def store_depth(
    row_ptr, value, first, depth, in_rows, add,
    EVEN: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores [ROWS, BLOCK] from element `first` on of rows that begin at row_ptr [ROWS], or adds to what is there."""
    d = first + tl.arange(0, BLOCK)
    mask = in_rows[:, None]
    if not EVEN:
        mask = mask & (d < depth // VECTOR * VECTOR)[None, :]
    ptr = row_ptr[:, None] + d[None, :]
    if VECTOR > 1:
        ptr = tl.multiple_of(ptr, (1, 16))
    if add:
        value += tl.load(ptr, mask=mask, other=0.0)
    tl.store(ptr, value, mask=mask)


@kernel
def linear_grad_logits_kernel(
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V], where HAS_BIAS
    targets_ptr,  # [N]
    order_ptr,  # [N]
    n_valid_ptr,  # [1]
    state_ptr,  # [STATE_WIDTH, N]
    grad_loss_ptr,  # [N]
    scale_ptr,  # [1], where SCALED
    scratch_ptr,  # [NP, SPAN], where PRODUCTS
    bias_partial_ptr,  # [NP / BLOCK_N, SPAN], zeros, where GRAD_BIAS
    n_rows: tl.int64,
    vocab_size: tl.int32,
    depth: tl.int32,
    hidden_stride: tl.int64,
    weight_stride: tl.int64,
    grad_loss_stride: tl.int64,
    n_row_blocks: tl.int32,
    n_column_blocks: tl.int32,
    first_column: tl.int32,
    span: tl.int32,
    diff_scale: tl.float64,
    cap: tl.float64,
    tanh_scale: tl.float64,
    logit_scale: tl.float64,
    HAS_BIAS: tl.constexpr,
    GRAD_BIAS: tl.constexpr,
    PRODUCTS: tl.constexpr,
    CAP: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program a tile: logits once more, Pass 2, and the gradient by these logits to the scratch.

    Reads BLOCK_N rows of hidden and BLOCK_V rows of weight, writes BLOCK_N * BLOCK_V gradients.
    """
    program = tl.program_id(0)
    block, column_block = tl.swizzle2d(
        program // n_column_blocks, program % n_column_blocks, n_row_blocks, n_column_blocks, GROUP
    )
    n_valid = tl.load(n_valid_ptr).to(tl.int32)
    if block * BLOCK_N >= n_valid:
        return
    real: tl.constexpr = state_ptr.dtype.element_ty
    row, in_rows = rows_at(order_ptr, n_valid, block * BLOCK_N, BLOCK_N)
    column, weight_row, in_columns = columns_at(vocab_size, first_column + column_block * BLOCK_V, BLOCK_V)
    x = logits_tile(
        hidden_ptr + row * hidden_stride, weight_ptr + weight_row * weight_stride, bias_ptr + weight_row, depth,
        real, HAS_BIAS, EVEN, VECTOR, BLOCK_D,
    )  # fmt: skip
    target = tl.load(targets_ptr + row).to(tl.int64)
    terms = terms_at(state_ptr, grad_loss_ptr, scale_ptr, row, n_rows, grad_loss_stride, logit_scale, SCALED)
    transform = transform_of(diff_scale, cap, tanh_scale, real)
    grad = grad_of_tile(x, column, target, in_rows[:, None] & in_columns[None, :], terms, transform, CAP)
    if PRODUCTS:
        tile_ptr = scratch_tile(scratch_ptr, block * BLOCK_N, column_block * BLOCK_V, span, BLOCK_N, BLOCK_V)
        tl.store(tile_ptr, rounded(grad, scratch_ptr.dtype.element_ty))
    if GRAD_BIAS:
        total = tl.sum(grad, axis=0)
        if SCALED:
            total *= 1.0 / tl.load(scale_ptr)
        in_span = column_block * BLOCK_V + tl.arange(0, BLOCK_V)
        tl.store(bias_partial_ptr + block.to(tl.int64) * span + in_span, total)


@kernel
def linear_grad_hidden_kernel(
    weight_ptr,  # [V, D]
    order_ptr,  # [N]
    n_valid_ptr,  # [1]
    scale_ptr,  # [1], where SCALED
    scratch_ptr,  # [NP, SPAN]
    grad_ptr,  # [n_splits, N, D]
    n_rows: tl.int64,
    vocab_size: tl.int32,
    depth: tl.int32,
    weight_stride: tl.int64,
    n_row_blocks: tl.int32,
    n_depth_blocks: tl.int32,
    first_column: tl.int32,
    n_columns: tl.int32,
    split_size: tl.int32,
    span: tl.int32,
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program a tile of the gradient by hidden states, which it alone writes: adds a split of the span's part.

    Sums over n_columns, split_size of them a split.
    """
    program = tl.program_id(0)
    split = program // (n_row_blocks * n_depth_blocks)
    program = program % (n_row_blocks * n_depth_blocks)
    block, depth_block = tl.swizzle2d(
        program // n_depth_blocks, program % n_depth_blocks, n_row_blocks, n_depth_blocks, GROUP
    )
    n_valid = tl.load(n_valid_ptr).to(tl.int32)
    if block * BLOCK_N >= n_valid:
        return
    real: tl.constexpr = grad_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_N, BLOCK_OUT), real)
    end = tl.minimum((split + 1) * split_size, n_columns)
    for k in range(bound(split * split_size), bound(end), BLOCK_K):
        _, weight_row, _ = columns_at(vocab_size, first_column + k, BLOCK_K)
        weight_rows = weight_ptr + weight_row * weight_stride
        grad = tl.load(scratch_tile(scratch_ptr, block * BLOCK_N, k, span, BLOCK_N, BLOCK_K))
        weight = load_depth(weight_rows, depth_block * BLOCK_OUT, depth, EVEN, VECTOR, BLOCK_OUT)
        total = tl.dot(operand(grad), operand(weight), total, input_precision="ieee", out_dtype=real)
    if SCALED:
        total *= 1.0 / tl.load(scale_ptr)
    row, in_rows = rows_at(order_ptr, n_valid, block * BLOCK_N, BLOCK_N)
    grad_rows = grad_ptr + (split * n_rows + row) * depth
    store_depth(grad_rows, total, depth_block * BLOCK_OUT, depth, in_rows, first_column > 0, EVEN, VECTOR, BLOCK_OUT)


@kernel
def linear_grad_weight_kernel(
    hidden_ptr,  # [N, D], by positions: a row's number would have to be there before its load could be under way
    n_valid_ptr,  # [1]
    scale_ptr,  # [1], where SCALED
    scratch_ptr,  # [NP, SPAN]
    grad_ptr,  # [V, D]
    vocab_size: tl.int32,
    depth: tl.int32,
    n_column_blocks: tl.int32,
    n_depth_blocks: tl.int32,
    first_column: tl.int32,
    span: tl.int32,
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program a tile of the gradient by weight, which it alone writes, once: sums over the rows that count."""
    program = tl.program_id(0)
    column_block, depth_block = tl.swizzle2d(
        program // n_depth_blocks, program % n_depth_blocks, n_column_blocks, n_depth_blocks, GROUP
    )
    real: tl.constexpr = grad_ptr.dtype.element_ty
    n_valid = tl.load(n_valid_ptr).to(tl.int32)
    total = tl.zeros((BLOCK_V, BLOCK_OUT), real)
    for k in range(0, bound(n_valid), BLOCK_K):
        position = tl.minimum(k + tl.arange(0, BLOCK_K), n_valid - 1).to(tl.int64)
        grad = tl.load(scratch_tile(scratch_ptr, k, column_block * BLOCK_V, span, BLOCK_K, BLOCK_V))
        hidden = load_depth(hidden_ptr + position * depth, depth_block * BLOCK_OUT, depth, EVEN, VECTOR, BLOCK_OUT)
        total = tl.dot(
            tl.trans(operand(grad)), operand(hidden), total,
            input_precision="ieee", out_dtype=real,
        )  # fmt: skip
    if SCALED:
        total *= 1.0 / tl.load(scale_ptr)
    _, weight_row, in_columns = columns_at(vocab_size, first_column + column_block * BLOCK_V, BLOCK_V)
    store_depth(
        grad_ptr + weight_row * depth, total, depth_block * BLOCK_OUT, depth, in_columns, False,
        EVEN, VECTOR, BLOCK_OUT,
    )  # fmt: skip
