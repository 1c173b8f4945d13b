// The loss of one token, and the merging of partial row statistics: the only place where MixCE is spelled out
// in C++. Host and device, no torch. Everything has internal linkage, so that a copy compiled for one
// instruction set cannot be picked by the linker for another.
#pragma once

#include <math.h>
#include <stdint.h>

#include "params.h"

#ifdef __CUDACC__
#define MIXCE_INLINE static __host__ __device__ __forceinline__
#else
#define MIXCE_INLINE static inline __attribute__((always_inline))
#endif

namespace mixce {

// Numbers of a token that a forward stores: m, s, a, c, t for its gradient, and nll, q, weight, lse, entropy,
// collision; for the entropy's gradient u and q * (z_target - m - u), with u the mean of z - m over the
// model's distribution.
static constexpr int kStateWidth = 5;
static constexpr int kStatsWidth = 6;
static constexpr int kEntropyStateWidth = 2;

template <typename Real>
static constexpr Real kLog2E = static_cast<Real>(1.4426950408889634);
// Added to a float below 2^22, it rounds that to an integer, which stands in the low bits of the sum.
static constexpr float kRoundToInteger = 0x1.8p23f;

// A vector of one number, for functions that also take the vectors of csrc/cpu.
template <typename Number>
struct Scalar {
  using Reg = Number;
  MIXCE_INLINE Reg set(Number value) { return value; }
  MIXCE_INLINE Reg fma(Reg a, Reg b, Reg c) { return ::fma(a, b, c); }
};

// The p of 2^f = 1 + p * f in float32, of least maximal error of that on [-1/2, 1/2].
template <typename V>
MIXCE_INLINE typename V::Reg exp2_polynomial(typename V::Reg f) {
  typename V::Reg p = V::fma(f, V::set(0x1.41fbbcp-13f), V::set(0x1.5f3e52p-10f));
  p = V::fma(f, p, V::set(0x1.3b2d4cp-7f));
  p = V::fma(f, p, V::set(0x1.c6aee8p-5f));
  p = V::fma(f, p, V::set(0x1.ebfbdcp-3f));
  return V::fma(f, p, V::set(0x1.62e430p-1f));
}

// With a softcap a logit x becomes cap * tanh(tanh_scale * x): the scale is applied inside of it. Without one
// the scale is applied to differences of logits, which keeps the digits of logits near 1e5.
MIXCE_INLINE bool has_softcap(const TokenOptions& options) { return options.softcap > 0; }
template <typename Real>
struct Softcap {
  Real cap, tanh_scale;
};
// Without a softcap a record that is not used.
template <typename Real>
MIXCE_INLINE Softcap<Real> softcap_of(const TokenOptions& options) {
  return {static_cast<Real>(options.softcap), static_cast<Real>(options.logit_scale / options.softcap)};
}
// The factor from a difference of (capped) logits to one of exponents.
MIXCE_INLINE double scale_of_differences(const TokenOptions& options) {
  return has_softcap(options) ? 1.0 : options.logit_scale;
}

// A capped logit and its slope by the argument of tanh, 1 - tanh^2, without the cancellation.
template <typename V>
struct Capped {
  typename V::Reg value, slope;
};
MIXCE_INLINE Capped<Scalar<double>> capped(double x, const Softcap<double>& softcap) {
  const double t = tanh(softcap.tanh_scale * x);
  return {softcap.cap * t, (1 - t) * (1 + t)};
}

// Whether the loss needs the sums of OnlineLogSumExp beside sum_exp.
MIXCE_INLINE bool needs_moments(const TokenOptions& options) { return options.label_smoothing > 0; }

// Statistics of the part of a row seen so far, for logits z: all sums are relative to the maximum m, so that
// a shift of all logits costs no digits.
template <typename Real>
struct OnlineLogSumExp {
  Real m;
  Real sum_exp;          // sum of exp(z - m)
  Real sum_shifted;      // sum of z - m, for label smoothing
  Real sum_exp_shifted;  // sum of exp(z - m) * (z - m), for the entropy
  Real sum_exp_squared;  // sum of exp(z - m)^2, for the collision probability
  int64_t count;
};

template <typename Real>
MIXCE_INLINE OnlineLogSumExp<Real> empty_log_sum_exp() {
  return {-static_cast<Real>(INFINITY), 0, 0, 0, 0, 0};
}

// Raises the maximum; sums relative to the new one may then be added. `exponential` is that of z, for a
// difference of maxima.
template <typename Real, typename Exponential>
MIXCE_INLINE void raise_maximum(OnlineLogSumExp<Real>& part, Real maximum, const Exponential& exponential) {
  if (!(maximum > part.m)) return;
  const Real shift = part.m - maximum;  // -inf for a part without a finite logit
  const Real factor = exponential(shift);
  // 0 * sum_exp keeps a NaN; a sum of 0 exponentials stays 0, where shift * 0 would be NaN.
  part.sum_exp_shifted =
      factor == 0 ? 0 * part.sum_exp : factor * (part.sum_exp_shifted + shift * part.sum_exp);
  part.sum_exp *= factor;
  part.sum_exp_squared *= factor * factor;
  if (part.count > 0) part.sum_shifted += part.count * shift;
  part.m = maximum;
}

// A token's loss, its statistics and the numbers from which its gradient is made:
// dloss/dz_j = a * p_j - c, and t at the target.
struct TokenTerms {
  double loss, nll, q, weight, lse, a, c, t;
};

// Sums over a row, beside its largest exponent m: `s` is log sum exp(z - m), `d_target` is z_target - m,
// `mean_shifted` the mean of z - m, read with label smoothing; `expected_shifted`, the mean over the model's
// distribution, and collision, sum p^2, are read by the weightings that need them.
struct RowSums {
  double s, d_target, mean_shifted, expected_shifted, collision;
};
MIXCE_INLINE double entropy_of(const RowSums& row) { return row.s - row.expected_shifted; }

// A token's eta and the weighting with its two parameters.
struct Mixture {
  double eta;
  Weighting weighting;
  double first, second;
};

// exp(y): in float32 of the part of y that is no power of two, since a y near 10 leaves a float a digit less.
template <typename Elementary>
MIXCE_INLINE double exp_of(double y) {
  if (sizeof(Elementary) == sizeof(double)) return exp(y);
  if (!(y >= -700)) return y < -700 ? 0 : y;
  const double exponent = fmin(y, 700.0) * kLog2E<double>, whole = rint(exponent);
  return ldexp(exp2(static_cast<Elementary>(exponent - whole)), static_cast<int>(whole));
}

// log(x) of an x > 0, likewise.
template <typename Elementary>
MIXCE_INLINE double log_of(double x) {
  if (sizeof(Elementary) == sizeof(double)) return log(x);
  int whole = 0;
  double fraction = frexp(x, &whole);
  if (fraction < 0.7) fraction *= 2, --whole;
  return whole / kLog2E<double> + log1p(static_cast<Elementary>(fraction - 1));
}

// x^exponent of an x that is no less than 0, or by a rounding.
template <typename Elementary>
MIXCE_INLINE double power(double x, double exponent) {
  if (exponent == 0) return 1;
  return x > 0 ? exp_of<Elementary>(exponent * log_of<Elementary>(x)) : 0;
}

// A token's f, NaN where q is. `not_q` is 1 - q; q is compared as the statistics return it, as a Real.
template <typename Real, typename Elementary>
MIXCE_INLINE double weighting_factor(const Mixture& mixture, double nll, double q, double not_q,
                                     const RowSums& row) {
  const double first = mixture.first, second = mixture.second;
  // The logarithm of q is that of a power of q, also where q itself has no digits left.
  double exponent = 0;
  switch (q == q ? mixture.weighting : Weighting::kProbability) {
    case Weighting::kProbability:
      return q;
    case Weighting::kPower:
      exponent = first;
      break;
    case Weighting::kCollisionPower:
      exponent = row.collision;
      break;
    case Weighting::kTaiLr: {
      const double share = first == 0 ? 1 : q / (first + (1 - first) * q);
      return share < second ? second : share;
    }
    case Weighting::kBand:
      return static_cast<Real>(q) >= static_cast<Real>(first) &&
             static_cast<Real>(q) <= static_cast<Real>(second);
    case Weighting::kFocal:
      return power<Elementary>(not_q, first);
    case Weighting::kVariance:
      return not_q > 0 ? q * not_q : 0;
    case Weighting::kEntropy:
      return power<Elementary>(entropy_of(row) / second, first);
    case Weighting::kGiven:
      return first;
  }
  return exponent == 0 ? 1 : exp_of<Elementary>(-exponent * nll);
}

// The mixture of Zhang et al. 2023 (arXiv 2305.16958), with another weighting in the place of q where asked
// for, label smoothing and z-loss. Exponentials are of type Elementary.
template <typename Real, typename Elementary>
MIXCE_INLINE TokenTerms token_terms(double m, const RowSums& row, const Mixture& mixture, int64_t vocab_size,
                                    const TokenOptions& options) {
  const double s = row.s;
  const double smoothing = options.label_smoothing;
  const double lse = m + s;
  const double nll = s - row.d_target;
  double ce = nll;
  // As nll + smoothing * (z_target - mean z), but without inf - inf where both are -inf.
  if (smoothing > 0) ce = smoothing * (s - row.mean_shifted) + (smoothing < 1 ? (1 - smoothing) * nll : 0);
  const double q = exp_of<Elementary>(-nll);
  // expm1: 1 - q has no digits left for q near 1, the tokens that the mixture weighs most.
  const double not_q = -expm1(static_cast<Elementary>(-nll));
  const double eta = mixture.eta;
  const double weight = eta + (1 - eta) * weighting_factor<Real, Elementary>(mixture, nll, q, not_q, row);
  const double z_slope = 2 * options.z_loss * lse;
  TokenTerms terms;
  // A weight of 0 is the limit of q log q, also where ce is infinite.
  terms.loss = (weight == 0 ? 0 : weight * ce) + (options.z_loss > 0 ? options.z_loss * lse * lse : 0);
  terms.nll = nll;
  terms.q = q;
  terms.weight = weight;
  terms.lse = lse;
  terms.a = options.z_loss > 0 ? weight + z_slope : weight;
  terms.c = weight * smoothing / vocab_size;
  terms.t = weight * (smoothing - not_q) - terms.c + (options.z_loss > 0 ? z_slope * q : 0);
  return terms;
}

// A row's numbers for its gradient, in the order in which they are stored; `m` before scale_of_differences.
template <typename Real>
MIXCE_INLINE void fill_state(Real m, double s, const TokenTerms& terms, Real (&state)[kStateWidth]) {
  state[0] = m, state[1] = static_cast<Real>(s), state[2] = static_cast<Real>(terms.a);
  state[3] = static_cast<Real>(terms.c), state[4] = static_cast<Real>(terms.t);
}

// What a row's gradient is made from: grad_j = slope_j * (exp(z_j - m) * (k + b * d_j) - c), and slope_y * t
// at the target, with slope the derivative of the softcap, 1 without one, and d_j the difference of (capped)
// logits whose exponential that is. b is 0 without a gradient of the entropy.
template <typename Real>
struct GradTerms {
  Real m, k, c, t, b;
};

// `factor` is the derivative of the exponents by the (uncapped) logits.
template <typename Elementary, typename Real>
MIXCE_INLINE GradTerms<double> grad_terms(const Real (&state)[kStateWidth], double grad_loss, double factor) {
  const double s = state[1], a = state[2], c = state[3], t = state[4];
  factor *= grad_loss;
  return {state[0], a * factor * exp(static_cast<Elementary>(-s)), c * factor, t * factor, 0};
}

// Adds the gradient of the entropy, whose derivative by z_j is -p_j * (z_j - m - u).
template <typename Elementary, typename Real>
MIXCE_INLINE void add_entropy_grad(GradTerms<double>& terms, const Real (&state)[kStateWidth],
                                   const Real (&entropy_state)[kEntropyStateWidth], double grad_entropy,
                                   double factor, double scale) {
  const double s = state[1], u = entropy_state[0], at_target = entropy_state[1];
  factor *= grad_entropy;
  const double share = factor * exp(static_cast<Elementary>(-s));
  terms.k += share * u;
  terms.b = -share * scale;
  terms.t -= factor * at_target;
}

// A difference of logits times its exponential is 0 where that is, also for a logit of -inf: the difference
// is taken as this at least.
template <typename Real>
static constexpr Real kLowestDifference = static_cast<Real>(-1e30);

}  // namespace mixce
