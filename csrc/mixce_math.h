// The loss of one token, and the merging of partial row statistics: the only place where MixCE is spelled out
// in C++. Host and device, no torch. Everything has internal linkage, so that a copy compiled for one
// instruction set cannot be picked by the linker for another.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define MIXCE_INLINE static __host__ __device__ __forceinline__
#else
#define MIXCE_INLINE static inline __attribute__((always_inline))
#endif

namespace mixce {

// What a token's loss is made from; eta, the only per-token one, is passed beside it. A softcap of 0 is none.
template <typename Real>
struct LossOptions {
  Real label_smoothing;
  Real z_loss;
};

// Statistics of the part of a row seen so far, for logits z: all sums are relative to the maximum m, so that
// a shift of all logits costs no digits.
template <typename Real>
struct OnlineLogSumExp {
  Real m;
  Real sum_exp;          // sum of exp(z - m)
  Real sum_shifted;      // sum of z - m, for label smoothing
  Real sum_exp_shifted;  // sum of exp(z - m) * (z - m), for the entropy
  int64_t count;
};

template <typename Real>
MIXCE_INLINE OnlineLogSumExp<Real> empty_log_sum_exp() {
  return {-static_cast<Real>(INFINITY), 0, 0, 0, 0};
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
  if (part.count > 0) part.sum_shifted += part.count * shift;
  part.m = maximum;
}

// A token's loss, its statistics and the numbers from which its gradient is made:
// dloss/dz_j = a * p_j - c, and t at the target.
template <typename Real>
struct TokenTerms {
  Real loss, nll, q, weight, lse, a, c, t;
};

// The mixture of Zhang et al. 2023 (arXiv 2305.16958), with label smoothing and z-loss. `s` is log sum exp(z
// - m), `d_target` is z_target - m, `mean_shifted` the mean of z - m. Exponentials are of type Elementary.
template <typename Real, typename Elementary = Real>
MIXCE_INLINE TokenTerms<Real> token_terms(Real m, Real s, Real d_target, Real mean_shifted, Real eta,
                                          int64_t vocab_size, const LossOptions<Real>& options) {
  const Real smoothing = options.label_smoothing;
  const Real lse = m + s;
  const Real nll = s - d_target;
  Real ce = nll;
  // As nll + smoothing * (z_target - mean z), but without inf - inf where both are -inf.
  if (smoothing > 0) ce = smoothing * (s - mean_shifted) + (smoothing < 1 ? (1 - smoothing) * nll : 0);
  const Real q = exp(static_cast<Elementary>(-nll));
  const Real weight = eta + (1 - eta) * q;
  const Real z_slope = 2 * options.z_loss * lse;
  TokenTerms<Real> terms;
  // A weight of 0 is the limit of q log q, also where ce is infinite.
  terms.loss = (weight == 0 ? 0 : weight * ce) + (options.z_loss > 0 ? options.z_loss * lse * lse : 0);
  terms.nll = nll;
  terms.q = q;
  terms.weight = weight;
  terms.lse = lse;
  terms.a = options.z_loss > 0 ? weight + z_slope : weight;
  terms.c = weight * smoothing / vocab_size;
  // expm1: q - 1 has no digits left for q near 1, the tokens that the mixture weighs most.
  terms.t = weight * (expm1(static_cast<Elementary>(-nll)) + smoothing) - terms.c +
            (options.z_loss > 0 ? z_slope * q : 0);
  return terms;
}

// What a row's gradient is made from: grad_j = slope_j * (exp(z_j - m) * k - c), and slope_y * t at the
// target, with slope the derivative of the softcap, 1 without one.
template <typename Real>
struct GradTerms {
  Real m, k, c, t;
};

template <typename Elementary>
MIXCE_INLINE GradTerms<double> grad_terms(double m, double s, double a, double c, double t, double grad_loss,
                                          double logit_scale) {
  const double factor = grad_loss * logit_scale;
  return {m, a * factor * exp(static_cast<Elementary>(-s)), c * factor, t * factor};
}

}  // namespace mixce
