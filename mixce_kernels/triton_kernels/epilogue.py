"""The work done once a row: its target, and its loss, state and statistics from the sums of pass 1."""

import triton
import triton.language as tl

from mixce_kernels.triton_kernels.mixce_math import (
    ENTROPY_STATE_WIDTH,
    STATE_WIDTH,
    STATS_WIDTH,
    as_real,
    capped,
    token_terms,
)


@triton.jit
def column_of(target, vocab_size):
    """A target's range check and its column: -1, which no logit has, where the target is out of range."""
    known = (target >= 0) & (target < vocab_size)
    return known, tl.where(known, target, -1).to(tl.int32)


@triton.jit
def mixture_of(
    eta_ptr, parameters_ptr, row, n_rows, eta_stride, eta_value, weighting, first, second, HAS_ETA: tl.constexpr
):
    """A token's mixture; that of all tokens where there is no tensor of etas, and no parameters [2, N]."""
    eta = as_real(eta_value, tl.float64)
    if HAS_ETA:
        eta = tl.load(eta_ptr + row * eta_stride).to(tl.float64)
    first, second = as_real(first, tl.float64), as_real(second, tl.float64)
    if parameters_ptr is not None:
        first = tl.load(parameters_ptr + row).to(tl.float64)
        second = tl.load(parameters_ptr + n_rows + row).to(tl.float64)
    return eta, weighting, first, second


@triton.jit
def upstream_of(grad_loss_ptr, token_scale_ptr, row, loaded, grad_loss_stride, token_scale_stride, real: tl.constexpr):
    """The upstream gradient of tokens' own losses: that of the loss times their factors in it, None for 1.

    It is not defined where it is not `loaded`.
    """
    upstream = tl.full((), 1.0, tl.float64)
    if token_scale_ptr is not None:
        upstream = tl.load(token_scale_ptr + row * token_scale_stride, mask=loaded, other=0.0)
    if grad_loss_ptr is not None:
        upstream *= tl.load(grad_loss_ptr + row * grad_loss_stride, mask=loaded, other=0.0).to(tl.float64)
    return upstream.to(real)


@triton.jit
def finish_rows(
    results,  # addresses of loss, state, stats, correct and entropy_state
    n_rows,
    at,  # where a row's results are, from these addresses
    written,  # which results are stored
    valid,  # which results are not 0; None: all of them
    lanes,  # of whole rows, as in `row_stats.py`
    x_target,
    known,  # which targets are in range
    mixture,
    vocab_size,
    transform,
    options,
    SMOOTH: tl.constexpr,
    CAP: tl.constexpr,
    STATS: tl.constexpr,
):
    """Stores loss, state and statistics of rows, and returns their state."""
    m, sum_exp, sum_shifted, sum_exp_shifted, sum_exp_squared, _, beaten = lanes
    _, _, _, diff_scale = transform
    real: tl.constexpr = m.dtype
    # A target out of range makes NaN of all that follows.
    s = tl.where(known, tl.log(sum_exp), float("nan")).to(tl.float64)
    mean_shifted = tl.full((), 0.0, tl.float64)
    entropy, collision = mean_shifted, mean_shifted
    if STATS:
        expected_shifted = diff_scale * (sum_exp_shifted / sum_exp)
        entropy = s - expected_shifted
        collision = (sum_exp_squared / (sum_exp * sum_exp)).to(tl.float64)
    if SMOOTH:
        mean_shifted = diff_scale * (sum_shifted.to(tl.float64) / vocab_size)
    z_target = x_target
    if CAP:
        z_target, _ = capped(x_target, transform)
    d_target = diff_scale * (z_target.to(tl.float64) - m)
    sums = (s, d_target, mean_shifted, entropy, collision)
    loss, nll, q, weight, lse, a, c, t = token_terms(diff_scale * m, sums, mixture, vocab_size, options, real, real)
    loss_ptr, state_ptr, stats_ptr, correct_ptr, entropy_state_ptr = results
    state = (m, s.to(real), a.to(real), c.to(real), t.to(real))
    store(loss_ptr + at, loss.to(real), written, valid)
    if state_ptr is not None:
        for i in tl.static_range(STATE_WIDTH):
            store(state_ptr + i * n_rows + at, state[i], written, valid)
    if STATS:
        stats = (nll, q, weight, lse, entropy, collision)
        for i in tl.static_range(STATS_WIDTH):
            store(stats_ptr + i * n_rows + at, stats[i].to(real), written, valid)
        correct = (beaten == 0) & (nll == nll)
        if valid is not None:
            correct = valid & correct
        tl.store(correct_ptr + at, correct, mask=written)
        if entropy_state_ptr is not None:
            at_target = tl.where(q == 0.0, 0.0, q * (d_target - expected_shifted))
            entropy_state = (expected_shifted, at_target)
            for i in tl.static_range(ENTROPY_STATE_WIDTH):
                store(entropy_state_ptr + i * n_rows + at, entropy_state[i].to(real), written, valid)
    return state


@triton.jit
def store(ptr, value, written, valid):
    """Stores a result, or 0 where it is not valid."""
    if valid is not None:
        value = tl.where(valid, value, 0.0)
    tl.store(ptr, value, mask=written)


@triton.jit
def finish_ignored_row(results, n_rows, row, STATS: tl.constexpr):
    """Stores the results of an ignored row, all 0."""
    loss_ptr, state_ptr, stats_ptr, correct_ptr, entropy_state_ptr = results
    tl.store(loss_ptr + row, 0.0)
    if state_ptr is not None:
        for i in tl.static_range(STATE_WIDTH):
            tl.store(state_ptr + i * n_rows + row, 0.0)
    if STATS:
        for i in tl.static_range(STATS_WIDTH):
            tl.store(stats_ptr + i * n_rows + row, 0.0)
        tl.store(correct_ptr + row, False)
    if entropy_state_ptr is not None:
        for i in tl.static_range(ENTROPY_STATE_WIDTH):
            tl.store(entropy_state_ptr + i * n_rows + row, 0.0)
