"""A row of logits in memory, and pass 2 over it: the gradient from the row's statistics.

A row's body is what of it can be taken in whole steps, one 16-byte vector a thread, from the row's first 16-byte
boundary on. The rest, less than a step and a vector before and after the body, is taken element by element.

A tile is [CTAS, STACK, LANES, VECTOR]: STACK vectors for each thread of the CTAS programs that share a row, which are a
thread-block cluster. CTAS is 1 for a program on its own; the rest's tile has vectors of one element.

Values that travel together are tuples:

    transform  rate, cap, tanh_scale: exp(z - m) is exp2(rate * difference of (capped) logits)
    terms      m, log2_sum, k, c, t: the gradient is slope * (p * k - c), and slope * t at the target
"""

import triton
import triton.language as tl

from mixce_kernels.triton_kernels.jit import bound
from mixce_kernels.triton_kernels.mixce_math import capped


@triton.jit
def row_begin(row, inner, outer_stride, inner_stride):
    """The 64-bit offset of a row's first element."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def head_of(row_ptr, VECTOR: tl.constexpr):
    """The elements before the row's first 16-byte boundary."""
    return ((-row_ptr.to(tl.int64) & 15).to(tl.int32) * VECTOR) // 16


@triton.jit
def tile_index(SHAPE: tl.constexpr):
    """Offsets of a tile's elements: each program's follow one another, and each thread's within a vector."""
    cta = tl.arange(0, SHAPE[0])[:, None, None, None]
    stack = tl.arange(0, SHAPE[1])[None, :, None, None]
    lane = tl.arange(0, SHAPE[2])[None, None, :, None]
    i = tl.arange(0, SHAPE[3])[None, None, None, :]
    return cta * (SHAPE[1] * SHAPE[2] * SHAPE[3]) + stack * (SHAPE[2] * SHAPE[3]) + lane * SHAPE[3] + i


@triton.jit
def rest_of(head, body_size, end, SHAPE: tl.constexpr):
    """Columns of the elements outside the body, and which of them exist: those before `end`, none for an end of 0."""
    i = tile_index(SHAPE)
    return tl.where(i < head, i, body_size + i), i < end - body_size


@triton.jit
def grad_terms(state, grad_loss, logit_scale):
    """What a row's gradient is made from, of its state and its upstream gradient."""
    m, s, a, c, t = state
    factor = grad_loss * logit_scale
    return m, s * 1.4426950408889634, a * factor, c * factor, t * factor


@triton.jit
def grad_of(x, begin, size, offsets, target_column, terms, transform, CAP: tl.constexpr):
    """Pass 2 for a tile of logits, whose columns are offsets less than `size` from `begin`."""
    m, log2_sum, k, c, t = terms
    rate, cap, tanh_scale = transform
    z = x.to(k.dtype)
    if CAP:
        z, slope = capped(z, cap, tanh_scale)
    grad = tl.exp2((z - m) * rate - log2_sum) * k - c
    # One comparison for a tile is cheaper than one for each logit.
    if (target_column >= begin) & (target_column < begin + size):
        grad = tl.where(offsets == target_column - begin, t, grad)
    if CAP:
        grad *= slope
    return grad


@triton.jit
def held_tiles(row_ptr, head, HELD: tl.constexpr, SHAPE: tl.constexpr):
    """HELD steps of a row's body in registers: tiles of a block each, then of a step each."""
    body_ptr = tl.multiple_of(row_ptr + head, 16)
    STEP: tl.constexpr = SHAPE[0] * SHAPE[2] * SHAPE[3]
    tiles = ()
    for i in tl.static_range(HELD // SHAPE[1]):
        block = tl.load(body_ptr + i * SHAPE[1] * STEP + tile_index(SHAPE))
        tiles = tiles + (block,)  # type: ignore[assignment]  # noqa: RUF005
    for i in tl.static_range(HELD // SHAPE[1] * SHAPE[1], HELD):
        step = tl.load(body_ptr + i * STEP + tile_index((SHAPE[0], 1, SHAPE[2], SHAPE[3])))
        tiles = tiles + (step,)  # type: ignore[assignment]  # noqa: RUF005
    return tiles


@triton.jit
def converted_anew(x, PTX: tl.constexpr):
    """The same logits, such that no compiler keeps their conversion to float32 for pass 2, in twice the registers."""
    if PTX and x.dtype.primitive_bitwidth == 16:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2)
    return x


@triton.jit
def grad_tile(
    logits_ptr,  # at the tile's first logit
    grad_ptr,  # at the tile's first gradient
    column,
    target_column,
    terms,
    transform,
    CAP: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Pass 2 for a tile of the body, from memory to memory."""
    i = tile_index(SHAPE)
    grad = grad_of(tl.load(logits_ptr + i), column, i.numel, i, target_column, terms, transform, CAP)
    tl.store(grad_ptr + i, grad.to(grad_ptr.dtype.element_ty), cache_modifier=".cs")


@triton.jit
def row_grad(
    logits_ptr,  # at the row's first logit
    grad_ptr,  # at the row's first gradient
    vocab_size,
    n_steps,
    first_step,
    end_step,
    target_column,
    terms,
    transform,
    CAP: tl.constexpr,
    SAME_WINDOW: tl.constexpr,
    STACK: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    REST: tl.constexpr,
):
    """Pass 2 over some steps of a row; who has the last has the rest, too."""
    STEP: tl.constexpr = LANES * VECTOR
    head = head_of(grad_ptr, VECTOR)
    # By the end: `&` of a mask and a scalar is an integer to Triton's interpreter, which 3.9 refuses as a mask.
    rest_end = tl.where(end_step == n_steps, vocab_size, 0)
    rest, in_rest = rest_of(head, n_steps * STEP, rest_end, (1, REST // LANES, LANES, 1))
    x_rest = tl.load(logits_ptr + rest, mask=in_rest)
    grad_body = tl.multiple_of(grad_ptr + head, 16)
    logits_body = logits_ptr + head
    if SAME_WINDOW:
        logits_body = tl.multiple_of(logits_body, 16)
    n_blocks = (end_step - first_step) // STACK
    for block in range(bound(n_blocks)):
        begin = (first_step + block * STACK) * STEP
        grad_tile(
            logits_body + begin, grad_body + begin, head + begin, target_column, terms, transform,
            CAP, (1, STACK, LANES, VECTOR),
        )  # fmt: skip
    for step in range(bound(first_step + n_blocks * STACK), bound(end_step)):
        begin = step * STEP
        grad_tile(
            logits_body + begin, grad_body + begin, head + begin, target_column, terms, transform,
            CAP, (1, 1, LANES, VECTOR),
        )  # fmt: skip
    if end_step == n_steps:
        grad = grad_of(x_rest, 0, vocab_size, rest, target_column, terms, transform, CAP)
        tl.store(grad_ptr + rest, grad.to(grad_ptr.dtype.element_ty), mask=in_rest)


@triton.jit
def fill_zeros(
    grad_ptr, vocab_size, n_steps, first_step, end_step,
    CTAS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Some steps of the gradient row of an ignored token; who has the last has the rest, too."""
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    STEP: tl.constexpr = CTAS * LANES * VECTOR
    head = head_of(grad_ptr, VECTOR)
    body_ptr = tl.multiple_of(grad_ptr + head, 16)
    for step in range(bound(first_step), bound(end_step)):
        zeros = tl.zeros((CTAS, 1, LANES, VECTOR), dtype)
        tl.store(body_ptr + step * STEP + tile_index((CTAS, 1, LANES, VECTOR)), zeros, cache_modifier=".cs")
    SHAPE: tl.constexpr = (CTAS, REST // (CTAS * LANES), LANES, 1)
    rest_end = tl.where(end_step == n_steps, vocab_size, 0)
    rest, in_rest = rest_of(head, n_steps * STEP, rest_end, SHAPE)
    tl.store(grad_ptr + rest, tl.zeros(SHAPE, dtype), mask=in_rest)
