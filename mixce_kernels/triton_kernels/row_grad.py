"""Pass 2 over a row of logits: the gradient from the row's terms (see `mixce_math.py`)."""

import triton
import triton.language as tl

from mixce_kernels.triton_kernels.jit import bound
from mixce_kernels.triton_kernels.mixce_math import capped
from mixce_kernels.triton_kernels.row_layout import head_of, moved, rest_of, rotated, tile_index


@triton.jit
def grad_of(x, begin, size, offsets, target_column, terms, transform, CAP: tl.constexpr):
    """Pass 2 for a tile of logits, whose columns are offsets less than `size` from `begin`."""
    m, log2_sum, k, c, t = terms[0], terms[1], terms[2], terms[3], terms[4]
    z = x.to(k.dtype)
    if CAP:
        z, slope = capped(z, transform)
    d = z - m
    p = tl.exp2(d * transform[0] - log2_sum)
    if len(terms) > 5:
        # The clamp keeps 0 * -inf out; p still brings a NaN.
        k += terms[5] * tl.maximum(d, -1e30)
    grad = p * k - c
    # One comparison for a tile is cheaper than one for each logit.
    if (target_column >= begin) & (target_column < begin + size):
        grad = tl.where(offsets == target_column - begin, t, grad)
    if CAP:
        grad *= slope
    return grad


@triton.jit
def converted_anew(x, PTX: tl.constexpr):
    """The same logits, such that no compiler keeps their conversion to float32 for pass 2, in twice the registers."""
    if x.dtype.primitive_bitwidth == 16:
        x = moved(x, PTX)
    return x


@triton.jit
def grad_held(
    grad_ptr,  # at the first tile's first gradient
    tiles,
    n_tiles,
    column,
    offsets,
    target_column,
    terms,
    transform,
    CAP: tl.constexpr,
    ROTATED: tl.constexpr,
    PTX: tl.constexpr,
):
    """Pass 2 for tiles in registers, from `column` on; `ROTATED` tiles are those that pass 1 takes in a loop."""
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    SIZE: tl.constexpr = offsets.numel
    if ROTATED:
        if len(tiles) > 0:
            for i in range(bound(n_tiles)):
                grad = grad_of(tiles[0], column + i * SIZE, SIZE, offsets, target_column, terms, transform, CAP)
                tl.store(grad_ptr + i * SIZE + offsets, grad.to(dtype), cache_modifier=".cs")
                tiles = rotated(tiles, PTX)
    else:
        for i in tl.static_range(len(tiles)):
            x = converted_anew(tiles[i], PTX)
            grad = grad_of(x, column + i * SIZE, SIZE, offsets, target_column, terms, transform, CAP)
            tl.store(grad_ptr + i * SIZE + offsets, grad.to(dtype), cache_modifier=".cs")


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
