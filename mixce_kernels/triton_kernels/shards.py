"""The kernels of a vocabulary whose columns lie on several ranks, TOKENS tokens a program: csrc/shards.h in Triton.

There the parts of a message are named. A header's integers are as wide as its numbers; `headers_ptr` is the address of
the messages as integers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mixce_kernels.backends import shards
from mixce_kernels.triton_kernels.jit import bound, kernel
from mixce_kernels.triton_kernels.mixce_math import (
    ENTROPY_STATE_WIDTH,
    STATE_WIDTH,
    STATS_WIDTH,
    as_real,
    coldness,
    token_terms,
)

HEADER = tl.constexpr(shards.HEADER)
IGNORED = tl.constexpr(shards.IGNORED)


@triton.jit
def holds(start, n_columns, target):
    """Whether a target is one of a rank's columns."""
    return (target >= start) & (target < start + n_columns)


@triton.jit
def largest_logit(state_ptr, n_tokens, row, mask):
    """The largest logit that the state of a forward tells: some kernels' m is finite in a row of -inf."""
    m = tl.load(state_ptr + row, mask=mask, other=0.0)
    s = tl.load(state_ptr + n_tokens + row, mask=mask, other=0.0)
    return tl.where(s == float("-inf"), float("-inf"), m)


@triton.jit
def difference_or_zero(a, b):
    """A difference, 0 in a row of -inf, which has none."""
    difference = a - b
    return tl.where(difference == difference, difference, 0.0)


@triton.jit
def is_negative(x):
    """The sign of a number, also of -0."""
    integer: tl.constexpr = tl.int64 if x.dtype == tl.float64 else tl.int32
    return x.to(integer, bitcast=True) < 0


@kernel
def localize_targets_kernel(
    targets_ptr,  # [N]
    local_ptr,  # [N]
    n_tokens: tl.int64,
    start: tl.int64,
    n_columns: tl.int64,
    ignore_index: tl.int64,
    elsewhere: tl.int64,
    TOKENS: tl.constexpr,
):
    """Targets of the whole vocabulary, counted from a rank's first column."""
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    in_rows = row < n_tokens
    target = tl.load(targets_ptr + row, mask=in_rows, other=0).to(tl.int64)
    local = tl.where(holds(start, n_columns, target), target - start, elsewhere)
    tl.store(local_ptr + row, tl.where(target == ignore_index, IGNORED, local), mask=in_rows)


@kernel
def write_message_kernel(
    targets_ptr,  # [N]
    loss_ptr,  # [N], where COLUMNS
    state_ptr,  # [STATE_WIDTH, N], where COLUMNS
    stats_ptr,  # [STATS_WIDTH, N], where COLUMNS and SMOOTH or STATS
    correct_ptr,  # [N], where COLUMNS and STATS
    largest_state_ptr,  # [STATE_WIDTH, N], where COLUMNS, CAP and STATS
    message_ptr,  # [HEADER + numbers * N]
    header_ptr,  # [HEADER], at the same address
    n_tokens: tl.int64,
    digest: tl.int64,
    start: tl.int64,
    n_columns: tl.int64,
    COLUMNS: tl.constexpr,  # whether there is one
    CAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    STATS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """What a rank tells the others, from the results of the row kernels with eta = 1."""
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    in_rows = row < n_tokens
    if tl.program_id(0) == 0:
        integer: tl.constexpr = header_ptr.dtype.element_ty
        tl.store(header_ptr, digest.to(integer))
        tl.store(header_ptr + 1, start.to(integer))
        tl.store(header_ptr + 2, n_columns.to(integer))

    real: tl.constexpr = message_ptr.dtype.element_ty
    zero = tl.full((TOKENS,), 0.0, real)
    m = zero - float("inf")
    s, d_target, mean_shifted, entropy, collision, largest = m, -m, zero, zero, zero, m
    if COLUMNS:
        target = tl.load(targets_ptr + row, mask=in_rows, other=0).to(tl.int64)
        loss = tl.load(loss_ptr + row, mask=in_rows, other=0.0)
        m = largest_logit(state_ptr, n_tokens, row, in_rows)
        s = tl.load(state_ptr + n_tokens + row, mask=in_rows, other=0.0)
        nll = loss
        if SMOOTH or STATS:
            nll = tl.load(stats_ptr + row, mask=in_rows, other=0.0)
        d_target = tl.where(holds(start, n_columns, target), difference_or_zero(s, nll), float("inf"))
        if SMOOTH:
            mean_shifted = difference_or_zero(s, loss)
        if STATS:
            entropy = tl.abs(tl.load(stats_ptr + 4 * n_tokens + row, mask=in_rows, other=0.0))
            collision = tl.load(stats_ptr + 5 * n_tokens + row, mask=in_rows, other=0.0)
            correct = tl.load(correct_ptr + row, mask=in_rows, other=0) != 0
            entropy = tl.where(correct, entropy, entropy * -1.0)
            if CAP:
                largest = largest_logit(largest_state_ptr, n_tokens, row, in_rows)

    message_ptr += HEADER + row
    tl.store(message_ptr, m, mask=in_rows)
    tl.store(message_ptr + n_tokens, s, mask=in_rows)
    tl.store(message_ptr + 2 * n_tokens, d_target, mask=in_rows)
    if SMOOTH:
        tl.store(message_ptr + 3 * n_tokens, mean_shifted, mask=in_rows)
    if STATS:
        tl.store(message_ptr + (3 + SMOOTH) * n_tokens, entropy, mask=in_rows)
        tl.store(message_ptr + (4 + SMOOTH) * n_tokens, collision, mask=in_rows)
        if CAP:
            tl.store(message_ptr + (5 + SMOOTH) * n_tokens, largest, mask=in_rows)


@kernel
def merge_messages_kernel(
    messages_ptr,  # [n_ranks, length]
    headers_ptr,  # the same as integers
    targets_ptr,  # [N]
    eta_ptr,  # [N], where HAS_ETA
    parameters_ptr,  # [2, N], or None
    temperature_ptr,  # [N], or None
    loss_ptr,  # [N]
    state_ptr,  # [STATE_WIDTH, N], or None
    stats_ptr,  # [STATS_WIDTH, N], where STATS
    correct_ptr,  # [N], where STATS
    entropy_state_ptr,  # [ENTROPY_STATE_WIDTH, N], where STATS, or None
    n_tokens: tl.int64,
    n_ranks: tl.int32,
    length: tl.int64,
    eta_stride: tl.int64,
    ignore_index: tl.int64,
    eta_value: tl.float64,
    weighting: tl.int32,
    first: tl.float64,
    second: tl.float64,
    label_smoothing: tl.float64,
    z_loss: tl.float64,
    diff_scale: tl.float64,
    HAS_ETA: tl.constexpr,
    CAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    STATS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Loss, state and statistics of rows from all ranks' messages, NaN unless one rank holds the target; in float64."""
    ENTROPY: tl.constexpr = 3 + SMOOTH
    LARGEST: tl.constexpr = ENTROPY + 2 if CAP else 0
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    in_rows = row < n_tokens
    target = tl.load(targets_ptr + row, mask=in_rows, other=0).to(tl.int64)
    scale = as_real(diff_scale, tl.float64)
    if temperature_ptr is not None:
        scale = scale * coldness(tl.load(temperature_ptr + row, mask=in_rows, other=1.0))
    numbers_ptr = messages_ptr + HEADER + row
    zero = tl.full((TOKENS,), 0.0, tl.float64)
    nothing = tl.full((TOKENS,), float("-inf"), tl.float64)

    m = nothing
    for rank in range(bound(n_ranks)):
        m = tl.maximum(m, tl.load(numbers_ptr + rank * length, mask=in_rows, other=0.0).to(tl.float64))

    vocab_size = tl.full((), 0, tl.int64)
    holders = tl.full((TOKENS,), 0, tl.int32)
    start_of_holder = tl.full((TOKENS,), 0, tl.int64)
    sum_exp, d_target, sum_shifted, largest_of_holder = zero, zero, zero, nothing
    first_of_largest = holders != 0
    for rank in range(bound(n_ranks)):
        rank_ptr = numbers_ptr + rank * length
        start = tl.load(headers_ptr + rank * length + 1).to(tl.int64)
        n_columns = tl.load(headers_ptr + rank * length + 2).to(tl.int64)
        # -inf for a rank without a finite logit.
        shift = scale * (tl.load(rank_ptr, mask=in_rows, other=0.0).to(tl.float64) - m)
        s_of = tl.load(rank_ptr + n_tokens, mask=in_rows, other=0.0).to(tl.float64)
        d_of = tl.load(rank_ptr + 2 * n_tokens, mask=in_rows, other=0.0).to(tl.float64)
        sum_exp += tl.exp(s_of + shift)
        vocab_size += n_columns
        if SMOOTH:
            mean_of = tl.load(rank_ptr + 3 * n_tokens, mask=in_rows, other=0.0).to(tl.float64)
            sum_shifted += tl.where(n_columns > 0, n_columns.to(tl.float64) * (mean_of + shift), 0.0)
        held = d_of != float("inf")
        holders += held.to(tl.int32)
        d_target += tl.where(held, d_of + shift, 0.0)
        if STATS:
            largest_of = tl.load(rank_ptr + LARGEST * n_tokens, mask=in_rows, other=0.0).to(tl.float64)
            is_largest = ~is_negative(tl.load(rank_ptr + ENTROPY * n_tokens, mask=in_rows, other=0.0))
            start_of_holder = tl.where(held, start, start_of_holder)
            largest_of_holder = tl.where(held, largest_of, largest_of_holder)
            first_of_largest = (held & is_largest) | (~held & first_of_largest)
    s = tl.where(holders == 1, tl.log(sum_exp), float("nan"))
    size = vocab_size.to(tl.float64)
    entropy, collision = zero, zero
    if STATS:
        for rank in range(bound(n_ranks)):
            rank_ptr = numbers_ptr + rank * length
            start = tl.load(headers_ptr + rank * length + 1).to(tl.int64)
            n_columns = tl.load(headers_ptr + rank * length + 2).to(tl.int64)
            shift = scale * (tl.load(rank_ptr, mask=in_rows, other=0.0).to(tl.float64) - m)
            log_share = tl.load(rank_ptr + n_tokens, mask=in_rows, other=0.0).to(tl.float64) + shift - s
            entropy_of = tl.abs(tl.load(rank_ptr + ENTROPY * n_tokens, mask=in_rows, other=0.0).to(tl.float64))
            share = tl.exp(log_share)
            entropy += tl.where(share == 0.0, 0.0, share * (entropy_of - log_share))
            collision_of = tl.load(rank_ptr + (ENTROPY + 1) * n_tokens, mask=in_rows, other=0.0).to(tl.float64)
            collision += tl.where(share == 0.0, 0.0, share * share * collision_of)
            # An equal logit before the target's beats it.
            largest_of = tl.load(rank_ptr + LARGEST * n_tokens, mask=in_rows, other=0.0).to(tl.float64)
            before = (n_columns > 0) & (start < start_of_holder)
            beaten = (largest_of > largest_of_holder) | ((largest_of == largest_of_holder) & before)
            first_of_largest = first_of_largest & ~beaten

    real: tl.constexpr = loss_ptr.dtype.element_ty
    eta = zero + as_real(eta_value, tl.float64)
    if HAS_ETA:
        eta = tl.load(eta_ptr + row * eta_stride, mask=in_rows, other=0.0).to(tl.float64)
    first, second = zero + as_real(first, tl.float64), zero + as_real(second, tl.float64)
    if parameters_ptr is not None:
        first = tl.load(parameters_ptr + row, mask=in_rows, other=0.0).to(tl.float64)
        second = tl.load(parameters_ptr + n_tokens + row, mask=in_rows, other=0.0).to(tl.float64)
    sums = (s, d_target, sum_shifted / size, entropy, collision)
    loss, nll, q, weight, lse, a, c, t = token_terms(
        scale * m, sums, (eta, weighting, first, second), size, (label_smoothing, z_loss), tl.float64, real
    )
    valid = target != ignore_index
    state = (m, s, a, c, t)
    tl.store(loss_ptr + row, tl.where(valid, loss, 0.0).to(real), mask=in_rows)
    if state_ptr is not None:
        for i in tl.static_range(STATE_WIDTH):
            tl.store(state_ptr + i * n_tokens + row, tl.where(valid, state[i], 0.0).to(real), mask=in_rows)
    if STATS:
        stats = (nll, q, weight, lse, entropy, collision)
        for i in tl.static_range(STATS_WIDTH):
            tl.store(stats_ptr + i * n_tokens + row, tl.where(valid, stats[i], 0.0).to(real), mask=in_rows)
        tl.store(correct_ptr + row, valid & first_of_largest & (nll == nll), mask=in_rows)
        if entropy_state_ptr is not None:
            expected_shifted = s - entropy
            at_target = tl.where(q == 0.0, 0.0, q * (d_target - expected_shifted))
            entropy_state = (expected_shifted, at_target)
            for i in tl.static_range(ENTROPY_STATE_WIDTH):
                value = tl.where(valid, entropy_state[i], 0.0).to(real)
                tl.store(entropy_state_ptr + i * n_tokens + row, value, mask=in_rows)
