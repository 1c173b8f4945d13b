"""The two passes over a row of logits: pass 1 yields the row's statistics, pass 2 its gradient.

A row is seen through a window that starts at the 16-byte boundary at or below the row's first logit, so that every
vector of the window is one aligned access whatever the row's address. The window's whole vectors are the body, taken in
blocks; the logits of a row in the vectors at its two ends that it fills in part are its edges, at most 2 * VECTOR - 2.

Values that travel together are tuples:

    lanes      m, sum_exp, sum_shifted, sum_exp_shifted, count, beaten: pass 1's statistics, [LANES] each
    transform  rate, cap, tanh_scale: exp(z - m) is exp2(rate * difference of (capped) logits)
    terms      m, k, c, t: the gradient is slope * (exp(z - m) * k - c), and slope * t at the target
"""

import triton
import triton.language as tl

from mixce_kernels.triton_kernels.math import capped


@triton.jit
def row_begin(row, inner, outer_stride, inner_stride):
    """The 64-bit offset of a row's first element."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def window_of(row_ptr, vocab_size, VECTOR: tl.constexpr):
    """The elements between the window's begin and the row's, and the bounds of the body in the window."""
    lead = ((row_ptr.to(tl.int64) & 15).to(tl.int32) * VECTOR) // 16
    body_begin = (lead + VECTOR - 1) // VECTOR * VECTOR
    body_end = (lead + vocab_size) // VECTOR * VECTOR
    return lead, body_begin, body_end


@triton.jit
def tile_of(body_begin, body_end, tile, tile_size, VECTOR: tl.constexpr):
    """A tile's begin in the window and its size; the size of an empty body or tile may be negative, by a vector."""
    begin = body_begin + tile * tile_size
    return tl.multiple_of(begin, VECTOR), tl.multiple_of(tl.minimum(body_end - begin, tile_size), VECTOR)


@triton.jit
def edges_of(window, vocab_size, VECTOR: tl.constexpr, SIZE: tl.constexpr):
    """Offsets [SIZE] in the window of the logits outside the body, and which of them exist."""
    lead, body_begin, body_end = window
    i = tl.arange(0, SIZE)
    end = lead + vocab_size
    offsets = tl.where(i < VECTOR, i, body_end - VECTOR + i)
    in_head = (i >= lead) & (i < tl.minimum(body_begin, end))
    in_tail = (offsets >= body_begin) & (offsets < end) & (i < 2 * VECTOR)
    return offsets, tl.where(i < VECTOR, in_head, in_tail)


@triton.jit
def empty_lanes(LANES: tl.constexpr, dtype: tl.constexpr):
    """Statistics of no logits."""
    zeros = tl.zeros((LANES,), dtype)
    return zeros - float("inf"), zeros, zeros, zeros, zeros, tl.zeros((LANES,), tl.int32)


@triton.jit
def lane_sum(values):
    """[STACK, LANES, VECTOR] to [LANES]: within a thread where LANES is the number of threads."""
    return tl.sum(tl.sum(values, axis=2), axis=0)


@triton.jit
def add_logits(
    lanes,
    x,  # [STACK * LANES * VECTOR], -inf where not valid
    columns,
    valid,  # None: all of them
    target_column,
    x_target,
    transform,
    SMOOTH: tl.constexpr,
    CAP: tl.constexpr,
    STATS: tl.constexpr,
    SHAPE: tl.constexpr,  # (STACK, LANES, VECTOR)
):
    """Pass 1 over one block. The running maximum belongs to a lane: one exponential for it serves all its logits."""
    m, sum_exp, sum_shifted, sum_exp_shifted, count, beaten = lanes
    rate, cap, tanh_scale = transform
    z = x.to(m.dtype)
    if STATS:
        beats = (z > x_target) | ((z == x_target) & (columns < target_column))
        if valid is not None:
            beats = beats & valid
        beaten += lane_sum(tl.reshape(beats.to(tl.int32), SHAPE))
    if CAP:
        z, _ = capped(z, cap, tanh_scale)
        if valid is not None:
            z = tl.where(valid, z, float("-inf"))
    z = tl.reshape(z, SHAPE)
    new_m = tl.maximum(m, tl.max(tl.max(z, axis=2), axis=0))
    # Before the first finite logit any finite reference will do.
    reference = tl.where(new_m == float("-inf"), 0.0, new_m)
    shift = m - reference
    factor = tl.exp2(shift * rate)
    d = z - reference[None, :, None]
    e = tl.exp2(d * rate)
    if STATS:
        sum_exp_shifted = moved_product(sum_exp, sum_exp_shifted, shift, factor) + lane_sum(e * tl.maximum(d, -1e30))
    sum_exp = sum_exp * factor + lane_sum(e)
    if SMOOTH:
        sum_shifted += tl.where(count == 0.0, 0.0, count * shift)
        if valid is not None:
            in_row = tl.reshape(valid, SHAPE)
            d = tl.where(in_row, d, 0.0)
            count += lane_sum(in_row.to(m.dtype))
        else:
            count += SHAPE[0] * SHAPE[2]
        sum_shifted += lane_sum(d)
    return new_m, sum_exp, sum_shifted, sum_exp_shifted, count, beaten


@triton.jit
def moved_product(sum_exp, sum_exp_shifted, shift, factor):
    """Sum of exp(z - m) * (z - m) after a rise of m; a factor of 0 leaves nothing but a NaN, where shift * 0 is one."""
    return tl.where(factor == 0.0, 0.0 * sum_exp, factor * (sum_exp_shifted + shift * sum_exp))


@triton.jit
def merge_lanes(lanes, rate, SMOOTH: tl.constexpr, STATS: tl.constexpr):
    """The row's statistics from its lanes': m, sum_exp, sum_shifted, sum_exp_shifted, beaten."""
    m_lane, sum_exp, sum_shifted, sum_exp_shifted, count, beaten = lanes
    m = tl.max(m_lane, axis=0)
    shift = m_lane - tl.where(m == float("-inf"), 0.0, m)
    factor = tl.exp2(shift * rate)
    if SMOOTH:
        sum_shifted = tl.sum(sum_shifted + tl.where(count == 0.0, 0.0, count * shift), axis=0)
    if STATS:
        sum_exp_shifted = tl.sum(moved_product(sum_exp, sum_exp_shifted, shift, factor), axis=0)
        beaten = tl.sum(beaten, axis=0)
    return m, tl.sum(sum_exp * factor, axis=0), sum_shifted, sum_exp_shifted, beaten


@triton.jit
def grad_terms(state, grad_loss, logit_scale):
    """What a row's gradient is made from, of its state and its upstream gradient."""
    m, s, a, c, t = state
    factor = grad_loss * logit_scale
    return m, a * factor * tl.exp(-s), c * factor, t * factor


@triton.jit
def grad_of(x, terms, transform, CAP: tl.constexpr):
    """Pass 2 for some logits, as if none were the target."""
    m, k, c, _ = terms
    rate, cap, tanh_scale = transform
    z = x.to(m.dtype)
    if CAP:
        z, slope = capped(z, cap, tanh_scale)
    grad = tl.exp2((z - m) * rate) * k - c
    if CAP:
        grad *= slope
    return grad


@triton.jit
def grad_at_target(x_target, terms, transform, CAP: tl.constexpr):
    """Pass 2 for the target."""
    grad = terms[3]
    if CAP:
        _, slope = capped(x_target.to(grad.dtype), transform[1], transform[2])
        grad *= slope
    return grad


@triton.jit
def row_grad(
    logits_ptr,  # at the row's first logit
    grad_ptr,  # at the row's first gradient
    vocab_size,
    tile,
    tile_size,
    target_column,
    terms,
    transform,
    CAP: tl.constexpr,
    SAME_WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Pass 2 over one tile of a row; the first tile has the edges."""
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    window = window_of(grad_ptr, vocab_size, VECTOR)
    lead, body_begin, body_end = window
    grad_ptr = tl.multiple_of(grad_ptr - lead, 16)
    logits_ptr -= lead
    if SAME_WINDOW:
        logits_ptr = tl.multiple_of(logits_ptr, 16)
    target_offset = lead + target_column
    in_body = (target_offset >= body_begin) & (target_offset < body_end)
    target_tile = tl.where(in_body, (target_offset - body_begin) // tile_size, 0)
    has_target = (target_column >= 0) & (target_tile == tile)
    at_target = terms[3]
    if CAP:
        at_target = grad_at_target(
            tl.load(logits_ptr + target_offset, mask=has_target, other=0.0), terms, transform, CAP
        )
        # The gradient may lie where the logits are: no thread writes before all have read.
        tl.debug_barrier()

    if tile == 0:
        offsets, in_edges = edges_of(window, vocab_size, VECTOR, 2 * VECTOR)
        x_edges = tl.load(logits_ptr + offsets, mask=in_edges)
        tl.store(grad_ptr + offsets, grad_of(x_edges, terms, transform, CAP).to(dtype), mask=in_edges)
    begin, size = tile_of(body_begin, body_end, tile, tile_size, VECTOR)
    logits_ptr += begin
    n_blocks = size // BLOCK
    for block in range(n_blocks):
        i = block * BLOCK + tl.arange(0, BLOCK)
        grad = grad_of(tl.load(logits_ptr + i), terms, transform, CAP)
        tl.store(grad_ptr + begin + i, grad.to(dtype), cache_modifier=".cs")
    for step in range(n_blocks * (BLOCK // STEP), tl.cdiv(size, STEP)):
        i = step * STEP + tl.arange(0, STEP)
        grad = grad_of(tl.load(logits_ptr + i, mask=i < size), terms, transform, CAP)
        tl.store(grad_ptr + begin + i, grad.to(dtype), mask=i < size, cache_modifier=".cs")
    # One number written twice is cheaper than a comparison with the target for each logit.
    tl.debug_barrier()
    tl.store(grad_ptr + target_offset, at_target.to(dtype), mask=has_target)


@triton.jit
def fill_zeros(grad_ptr, vocab_size, tile, tile_size, STEP: tl.constexpr, VECTOR: tl.constexpr):
    """One tile of the gradient row of an ignored token."""
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    window = window_of(grad_ptr, vocab_size, VECTOR)
    lead, body_begin, body_end = window
    grad_ptr = tl.multiple_of(grad_ptr - lead, 16)
    if tile == 0:
        offsets, in_edges = edges_of(window, vocab_size, VECTOR, 2 * VECTOR)
        tl.store(grad_ptr + offsets, tl.zeros((2 * VECTOR,), dtype), mask=in_edges)
    begin, size = tile_of(body_begin, body_end, tile, tile_size, VECTOR)
    i = tl.arange(0, STEP)
    for step in range(tl.cdiv(size, STEP)):
        block_ptr = grad_ptr + begin + step * STEP + i
        tl.store(block_ptr, tl.zeros((STEP,), dtype), mask=i < size - step * STEP, cache_modifier=".cs")
