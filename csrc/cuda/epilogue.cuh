// What is done once a row: finding it and its target, and making its loss, statistics and state of pass 1.
#pragma once

#include "reduce.cuh"

namespace mixce {

// A value that one lane loads for its warp.
template <typename Load>
__device__ __forceinline__ auto loaded_once(Load load) {
  decltype(load()) value{};
  if (threadIdx.x % kWarpSize == 0) value = load();
  return __shfl_sync(kAllLanes, value, 0);
}

// A row's target: ignored, or a column of the row, or none because it is out of range.
struct Target {
  bool ignored, known;
  int column;  // -1 where not known
};
__device__ __forceinline__ Target target_of(const RowParams& p, uint32_t row) {
  const int64_t target = loaded_once([&] { return target_at(p, row); });
  const bool known = target >= 0 && target < p.vocab_size;
  return {target == p.options.ignore_index, known, known ? static_cast<int>(target) : -1};
}

// 1 / temperature without the division of float64, which is a call that takes registers from the whole
// kernel.
template <typename Real>
__device__ __forceinline__ double inverse_of(double temperature) {
  if constexpr (sizeof(Real) == sizeof(double)) return 1 / temperature;
  double inverse = ptx::reciprocal_approx(static_cast<float>(temperature));
#pragma unroll
  for (int i = 0; i < 2; ++i) inverse = fma(inverse, fma(-temperature, inverse, 1.0), inverse);
  return inverse;
}

// `row_scale` of logits that have a cap or not, by `load`, which calls what it is given.
template <bool kCap, typename Real, typename Load>
__device__ __forceinline__ double scale_of_row(const RowParams& p, uint32_t row, Load load) {
  const double scale = kCap ? 1 : p.options.logit_scale;
  if (p.temperature == nullptr) return scale;
  return scale * inverse_of<Real>(load([&] { return temperature_at<Real>(p, row); }));
}

// A row's terms for pass 2 in the type of its arithmetic; the slope of the softcap at the target goes into t.
template <bool kCap, bool kEntropy, typename Real>
__device__ __forceinline__ GradTerms<Real> pass_2_terms(const RowParams& p, uint32_t row, double scale,
                                                        const Real (&state)[kStateWidth], Real x_target) {
  const auto terms = grad_terms_at<Real, kEntropy>(p, row, state, scale);
  Real t = static_cast<Real>(terms.t);
  if constexpr (kCap) t *= capped(x_target, softcap_of<Real>(p.options)).slope;
  return {state[0], static_cast<Real>(terms.k), static_cast<Real>(terms.c), t, static_cast<Real>(terms.b)};
}

// The epilogue of a row: its loss, statistics and state from pass 1, by one thread. Returns the state.
// `mixture` is the token's, from parameters that no other thread reads; `scale` is that of `row_scale`.
template <bool kCap, bool kMoments, typename Real>
__device__ __forceinline__ void finish_row(const RowParams& p, const ForwardParams& f, const Mixture& mixture,
                                           uint32_t row, double scale, const Partial<Real>& part,
                                           Real x_target, bool known, bool write,
                                           Real (&state)[kStateWidth]) {
  Real z_target = x_target;
  if constexpr (kCap) z_target = capped(x_target, softcap_of<Real>(p.options)).value;
  const double m = part.sums.m;
  // A target out of range makes NaN of all that follows.
  const double s = known ? static_cast<double>(log(part.sums.sum_exp)) : NAN;
  const double mean_shifted = kMoments ? scale * part.sums.sum_shifted / p.vocab_size : 0;
  RowSums sums = {s, scale * (z_target - m), mean_shifted, 0, 0};
  if constexpr (kMoments) {
    const double sum_exp = part.sums.sum_exp;
    sums.expected_shifted = scale * part.sums.sum_exp_shifted / sum_exp;
    sums.collision = part.sums.sum_exp_squared / (sum_exp * sum_exp);
  }
  const auto terms = token_terms<Real, Real>(scale * m, sums, mixture, p.vocab_size, p.options);
  fill_state(part.sums.m, s, terms, state);
  if (!write) return;
  store_loss(p, f, row, terms.loss, state);
  if (kMoments && f.stats != nullptr) store_stats<Real>(p, f, row, terms, sums, !part.beaten);
}

}  // namespace mixce
