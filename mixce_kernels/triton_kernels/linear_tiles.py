"""Tiles of logits that never reach memory: a block of rows of hidden [N, D] times a block of rows of weight [V, D].

Rows are taken in the order of `order` [N], those that count first: position i is row order[i], and positions from
`n_valid` on are ignored tokens, of which nothing is read. What lies past the last position or the last column is
loaded as the last one is, which needs no mask, and dropped afterwards.

VECTOR is the number of elements of which every row's address and the depth are multiples: 16 bytes, or 1.
"""

import triton
import triton.language as tl

from mixce_kernels.triton_kernels.jit import INTERPRETED, bound
from mixce_kernels.triton_kernels.mixce_math import capped, grad_terms


@triton.jit
def rows_at(order_ptr, n_valid, first, BLOCK: tl.constexpr):
    """The rows [BLOCK] at positions from `first` on, and which of them count."""
    position = first + tl.arange(0, BLOCK)
    row = tl.load(order_ptr + tl.minimum(position, n_valid - 1)).to(tl.int64)
    return row, position < n_valid


@triton.jit
def columns_at(vocab_size, first, BLOCK: tl.constexpr):
    """The columns [BLOCK] from `first` on, which rows of the weight they are, and which of them exist."""
    column = first + tl.arange(0, BLOCK)
    return column, tl.minimum(column, vocab_size - 1).to(tl.int64), column < vocab_size


@triton.jit
def load_depth(row_ptr, first, depth, EVEN: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Elements first..first + BLOCK of rows that begin at row_ptr [ROWS]: [ROWS, BLOCK], 0 past the depth."""
    d = first + tl.arange(0, BLOCK)
    ptr = row_ptr[:, None] + d[None, :]
    if VECTOR > 1:
        ptr = tl.multiple_of(ptr, (1, 16))
    if EVEN:
        return tl.load(ptr)
    # A multiple of VECTOR, which the compiler cannot know: whole vectors are in or out.
    return tl.load(ptr, mask=(d < depth // VECTOR * VECTOR)[None, :], other=0.0)


@triton.jit
def operand(x):
    """A tile as tl.dot takes it: the interpreter has no arithmetic in bfloat16."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return x.to(tl.float32)
    return x


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Rounds to nearest, ties to even, as GPUs do; the interpreter would cut float32 to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def logits_tile(
    hidden_rows,  # [BLOCK_N] addresses
    weight_rows,  # [BLOCK_V] addresses
    bias_ptr,  # [BLOCK_V] addresses, where HAS_BIAS
    depth,
    real: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Logits [BLOCK_N, BLOCK_V] of type `real`, in which they are summed."""
    x = tl.zeros((hidden_rows.shape[0], weight_rows.shape[0]), real)
    for first in range(0, bound(depth), BLOCK_D):
        hidden = operand(load_depth(hidden_rows, first, depth, EVEN, VECTOR, BLOCK_D))
        weight = operand(load_depth(weight_rows, first, depth, EVEN, VECTOR, BLOCK_D))
        x = tl.dot(hidden, tl.trans(weight), x, input_precision="ieee", out_dtype=real)
    if HAS_BIAS:
        x += tl.load(bias_ptr).to(real)[None, :]
    return x


@triton.jit
def terms_at(state_ptr, grad_loss_ptr, scale_ptr, row, n_rows, grad_loss_stride, logit_scale, SCALED: tl.constexpr):
    """The terms [ROWS] of these rows; SCALED ones have one more factor."""
    state_ptr += row
    real: tl.constexpr = state_ptr.dtype.element_ty
    grad_loss = tl.load(grad_loss_ptr + row * grad_loss_stride).to(real)
    if SCALED:
        grad_loss *= tl.load(scale_ptr)
    state = (
        tl.load(state_ptr),
        tl.load(state_ptr + n_rows),
        tl.load(state_ptr + 2 * n_rows),
        tl.load(state_ptr + 3 * n_rows),
        tl.load(state_ptr + 4 * n_rows),
    )
    return grad_terms(state, grad_loss, logit_scale)


@triton.jit
def grad_of_tile(
    x,  # [BLOCK_N, BLOCK_V]
    column,  # [BLOCK_V]
    target,  # [BLOCK_N]
    kept,  # [BLOCK_N, BLOCK_V]
    terms,  # [BLOCK_N] each
    transform,
    CAP: tl.constexpr,
):
    """Pass 2 for a tile of logits, 0 where not kept."""
    m, log2_sum, k, c, t = terms
    z = x
    if CAP:
        z, slope = capped(x, transform)
    grad = tl.exp2((z - m[:, None]) * transform[0] - log2_sum[:, None]) * k[:, None] - c[:, None]
    grad = tl.where(column[None, :] == target[:, None], t[:, None], grad)
    if CAP:
        grad *= slope
    # Whatever the factor, a product with what is not kept must be 0.
    return tl.where(kept, grad, 0.0)
