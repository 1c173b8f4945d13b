"""The loss of one token and the functions it needs: the transcription of `csrc/mixce_math.h` in Triton.

Only operations that mean the same on NVIDIA, AMD and under the interpreter: no libdevice, no inline assembly.

Values that travel together are tuples:

    transform  rate, cap, tanh_scale, diff_scale: exp(z - m) is exp2(rate * difference of (capped) logits), and z - m is
               diff_scale times that difference, in float64
    options    the numbers that `token_terms` takes from the caller, as the kernels get them
    mixture    eta, the weighting's number (`Weighting` of csrc/params.h) and its two parameters, of each token
    sums       s, d_target, mean_shifted, entropy, collision: of a row, where s is log sum exp(z - m), d_target is
               z_target - m, mean_shifted the mean of z - m, and collision sum p^2
    state      m, s, a, c, t: what the forward leaves of a token for its gradient
    terms      m, log2_sum, k, c, t: the gradient is slope * (p * k - c), and slope * t at the target; with that of an
               entropy b, too: k is then k + b * d, where d is the difference of (capped) logits that makes p
"""

import triton
import triton.language as tl

from mixce_kernels import weightings
from mixce_kernels.backends import results

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
STATE_WIDTH = tl.constexpr(results.STATE_WIDTH)
STATS_WIDTH = tl.constexpr(results.STATS_WIDTH)
ENTROPY_STATE_WIDTH = tl.constexpr(results.ENTROPY_STATE_WIDTH)
PROBABILITY, POWER, TAILR, BAND, FOCAL, VARIANCE, ENTROPY, COLLISION_POWER, GIVEN = (
    tl.constexpr(i) for i in range(len(weightings.KINDS))
)


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, with a relative error of some ulp also near 0."""
    if x.dtype == tl.float64:
        # Taylor, innermost term first: 0.5^16 / 17! < 1e-19.
        near_zero = 1.0 + x * (1.0 / 17)
        for i in tl.static_range(15):
            near_zero = 1.0 + x * near_zero * (1.0 / (16 - i))
    else:
        # Least maximum relative error over [-0.5, 0]: 1.4e-9.
        near_zero = x * 0.0011216348502784967 + 0.008187386207282543
        near_zero = near_zero * x + 0.041629090905189514
        near_zero = near_zero * x + 0.16666224598884583
        near_zero = near_zero * x + 0.4999998211860657
        near_zero = near_zero * x + 1.0
    return tl.where(x > -0.5, x * near_zero, tl.exp(x) - 1.0)


@triton.jit
def as_real(value, dtype: tl.constexpr):
    """A float argument as a scalar of `dtype`; the interpreter hands it over as a Python number, which has no `.to`."""
    return (value + tl.full((), 0.0, dtype)).to(dtype)


@triton.jit
def coldness(temperature):
    """The inverse of a token's temperature, in float64; NaN unless that is positive."""
    return tl.where(temperature > 0.0, 1.0 / temperature.to(tl.float64), float("nan"))


@triton.jit
def transform_of(diff_scale, cap, tanh_scale, real: tl.constexpr):
    """The transform of logits, from the numbers that a kernel gets."""
    diff_scale = as_real(diff_scale, tl.float64)
    return (diff_scale * LOG2_E).to(real), as_real(cap, real), as_real(tanh_scale, real), diff_scale


@triton.jit
def capped(x, transform):
    """Cap * tanh(tanh_scale * x) and its slope by its argument, 1 - tanh^2, without the cancellation."""
    _, cap, tanh_scale, _ = transform
    u = tanh_scale * x
    below_one = expm1(-2.0 * tl.abs(u))  # tanh|u| = -below_one / (below_one + 2)
    inverse = 1.0 / (below_one + 2.0)
    tanh_magnitude = -below_one * inverse
    slope = 4.0 * tl.exp(-2.0 * tl.abs(u)) * (inverse * inverse)
    return cap * tl.where(u < 0.0, -tanh_magnitude, tanh_magnitude), slope


@triton.jit
def finite(m):
    """The number that logits are taken relative to: before the first finite logit any finite number will do."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def raise_maximum(lanes, m, rate, SMOOTH: tl.constexpr, STATS: tl.constexpr):
    """The statistics of lanes (see `row_stats.py`) relative to an m that is no less than theirs."""
    m_lane, sum_exp, sum_shifted, sum_exp_shifted, sum_exp_squared, count, beaten = lanes
    shift = m_lane - finite(m)
    factor = tl.exp2(shift * rate)
    if SMOOTH:
        sum_shifted += tl.where(count == 0.0, 0.0, count * shift)
    if STATS:
        # A factor of 0 leaves nothing but a NaN, where shift * 0 is one.
        moved = factor * (sum_exp_shifted + shift * sum_exp)
        sum_exp_shifted = tl.where(factor == 0.0, 0.0 * sum_exp, moved)
        sum_exp_squared *= factor * factor
    return m, sum_exp * factor, sum_shifted, sum_exp_shifted, sum_exp_squared, count, beaten


@triton.jit
def exp_of(y, real: tl.constexpr):
    """exp(y): in float32 of the part of y that is no power of two, since a y near 10 leaves a float a digit less."""
    if real == tl.float64:
        found = tl.exp(y)
    else:
        exponent = tl.minimum(tl.maximum(y, -700.0), 700.0) * LOG2_E
        whole = tl.floor(exponent + 0.5)
        power_of_two = ((whole.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
        found = tl.exp2((exponent - whole).to(tl.float32)).to(tl.float64) * power_of_two
        found = tl.where(y < -700.0, 0.0, tl.where(y == y, found, y))
    return found


@triton.jit
def log_of(x, real: tl.constexpr):
    """log(x) of an x > 0, likewise."""
    if real == tl.float64:
        found = tl.log(x)
    else:
        # In float32 but for the sum: x is no more exact.
        near = x.to(tl.float32)
        bits = near.to(tl.int32, bitcast=True)
        whole = (bits - 0x3F333333) >> 23
        # From 0.7 to 1.4.
        fraction = (bits - (whole << 23)).to(tl.float32, bitcast=True)
        found = whole.to(tl.float64) * LN_2 + tl.log(fraction).to(tl.float64)
    return found


@triton.jit
def power(x, exponent, real: tl.constexpr):
    """x^exponent of an x that is no less than 0, or by a rounding."""
    found = tl.where(x > 0.0, exp_of(exponent * log_of(tl.where(x > 0.0, x, 1.0), real), real), 0.0)
    return tl.where(exponent == 0.0, 1.0, found)


@triton.jit
def weighting_factor(mixture, nll, q, not_q, sums, real: tl.constexpr, returned: tl.constexpr):
    """A token's f, NaN where q is: not_q is 1 - q; q is compared as the statistics return it, in type `returned`."""
    _, weighting, first, second = mixture
    _, _, _, entropy, collision = sums
    # A branch each, since together they would take more registers than rows that are held leave.
    f = q
    if (weighting == POWER) | (weighting == COLLISION_POWER):
        exponent = tl.where(weighting == POWER, first, collision)
        f = tl.where(exponent == 0.0, 1.0, exp_of(-exponent * nll, real))
    if weighting == TAILR:
        f = tl.maximum(tl.where(first == 0.0, 1.0, q / (first + (1.0 - first) * q)), second)
    if weighting == BAND:
        q_returned = q.to(returned)
        within = (q_returned >= first.to(returned)) & (q_returned <= second.to(returned))
        f = tl.where(within, 1.0, 0.0).to(tl.float64)
    if weighting == VARIANCE:
        f = q * tl.maximum(not_q, 0.0)
    if (weighting == FOCAL) | (weighting == ENTROPY):
        f = power(tl.where(weighting == FOCAL, not_q, entropy / second), first, real)
    if weighting == GIVEN:
        f = first + 0.0 * q
    return tl.where(q == q, f, q)


@triton.jit
def token_terms(m, sums, mixture, vocab_size, options, real: tl.constexpr, returned: tl.constexpr):
    """A token's loss, its statistics and the numbers from which its gradient is made.

    m is the largest z. The gradient is dloss/dz_j = a * p_j - c, and t at the target. All are float64, for some twenty
    operations a row: nll is a difference, and the loss a product of roundings. Exponentials are of type `real`, results
    of type `returned`.
    """
    eta, weighting, _, _ = mixture
    s, d_target, mean_shifted, _, _ = sums
    label_smoothing, z_loss = options
    label_smoothing, z_loss = as_real(label_smoothing, tl.float64), as_real(z_loss, tl.float64)
    lse = m + s
    nll = s - d_target
    # As nll + label_smoothing * (z_target - mean z), but without inf - inf where both are -inf.
    kept = tl.where(label_smoothing < 1.0, (1.0 - label_smoothing) * nll, 0.0)
    ce = tl.where(label_smoothing > 0.0, label_smoothing * (s - mean_shifted) + kept, nll)
    q = exp_of(-nll, real)
    # expm1: 1 - q has no digits left for q near 1, the tokens that the mixture weighs most.
    not_q = -expm1(-nll.to(real)).to(tl.float64)
    f = q
    if weighting != PROBABILITY:
        f = weighting_factor(mixture, nll, q, not_q, sums, real, returned)
    weight = eta + (1.0 - eta) * f
    z_slope = tl.where(z_loss > 0.0, 2.0 * z_loss * lse, 0.0)
    # A weight of 0 is the limit of q log q, also where ce is infinite.
    loss = tl.where(weight == 0.0, 0.0, weight * ce) + tl.where(z_loss > 0.0, z_loss * lse * lse, 0.0)
    a = weight + z_slope
    c = weight * label_smoothing / vocab_size
    t = weight * (label_smoothing - not_q) - c + tl.where(z_loss > 0.0, z_slope * q, 0.0)
    return loss, nll, q, weight, lse, a, c, t


@triton.jit
def grad_terms(state, grad_loss, logit_scale):
    """The terms of a token's gradient, from its state and its upstream gradient."""
    m, s, a, c, t = state
    factor = grad_loss * as_real(logit_scale, grad_loss.dtype)
    return m, s * LOG2_E, a * factor, c * factor, t * factor


@triton.jit
def with_entropy(terms, entropy_state, grad_entropy, logit_scale, diff_scale):
    """The terms with the gradient of the entropy, whose derivative by z_j is -p_j * (z_j - m - u)."""
    m, log2_sum, k, c, t = terms
    u, at_target = entropy_state
    factor = grad_entropy * as_real(logit_scale, grad_entropy.dtype)
    return m, log2_sum, k + factor * u, c, t - factor * at_target, -factor * as_real(diff_scale, grad_entropy.dtype)
