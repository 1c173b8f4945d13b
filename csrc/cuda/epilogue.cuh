// What is done once a row: finding it and its target, and making its loss, statistics and state of pass 1.
#pragma once

#include "reduce.cuh"

namespace mixce {

__device__ __forceinline__ int64_t row_offset(const RowLayout& layout, uint32_t row) {
  const uint32_t inner = static_cast<uint32_t>(layout.inner);
  return (row / inner) * layout.outer_stride + (row % inner) * layout.inner_stride;
}

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
  const int64_t target = loaded_once([&] {
    return p.targets_int64 ? static_cast<const int64_t*>(p.targets)[row]
                           : static_cast<int64_t>(static_cast<const int32_t*>(p.targets)[row]);
  });
  const bool known = target >= 0 && target < p.vocab_size;
  return {target == p.ignore_index, known, known ? static_cast<int>(target) : -1};
}

// A row's terms for pass 2 in the type of its arithmetic; the slope of the softcap at the target goes into t.
template <bool kCap, typename Real>
__device__ __forceinline__ GradTerms<Real> pass_2_terms(const RowParams& p, uint32_t row,
                                                        const Real (&state)[5], Real x_target) {
  const Real grad_loss = static_cast<const Real*>(p.grad_loss)[row * p.grad_loss_stride];
  const auto terms =
      grad_terms<Real>(state[0], state[1], state[2], state[3], state[4], grad_loss, p.logit_scale);
  Real t = static_cast<Real>(terms.t);
  if constexpr (kCap) t *= capped(x_target, Softcap<Real>(p)).slope;
  return {state[0], static_cast<Real>(terms.k), static_cast<Real>(terms.c), t};
}

// The epilogue of a row: its loss, statistics and state from pass 1, by one thread. Returns m, s, a, c, t.
template <bool kCap, bool kMoments, typename Real>
__device__ __forceinline__ void finish_row(const RowParams& p, const ForwardParams& f, uint32_t row,
                                           const Partial<Real>& part, Real x_target, bool known, bool write,
                                           Real (&state)[5]) {
  Real z_target = x_target;
  if constexpr (kCap) z_target = capped(x_target, Softcap<Real>(p)).value;
  const double scale = scale_of_differences(p);
  const double m = part.sums.m;
  // A target out of range makes NaN of all that follows.
  const double s = known ? static_cast<double>(log(part.sums.sum_exp)) : NAN;
  const double mean_shifted = kMoments ? scale * part.sums.sum_shifted / p.vocab_size : 0;
  const double eta = f.eta == nullptr ? f.eta_value : static_cast<const Real*>(f.eta)[row * f.eta_stride];
  const auto terms = token_terms<double, Real>(scale * m, s, scale * (z_target - m), mean_shifted, eta,
                                               p.vocab_size, {p.label_smoothing, p.z_loss});
  state[0] = part.sums.m, state[1] = static_cast<Real>(s), state[2] = static_cast<Real>(terms.a);
  state[3] = static_cast<Real>(terms.c), state[4] = static_cast<Real>(terms.t);
  if (!write) return;
  static_cast<Real*>(f.loss)[row] = static_cast<Real>(terms.loss);
#pragma unroll
  for (int i = 0; i < 5; ++i) static_cast<Real*>(p.state)[i * p.rows + row] = state[i];
  if (kMoments && f.stats != nullptr) {
    const double entropy = s - scale * part.sums.sum_exp_shifted / part.sums.sum_exp;
    const double stats[5] = {terms.nll, terms.q, terms.weight, terms.lse, entropy};
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      static_cast<Real*>(f.stats)[i * p.rows + row] = static_cast<Real>(stats[i]);
    }
    f.correct[row] = !part.beaten && terms.nll == terms.nll;
  }
}

// Results of an ignored row, all 0.
template <typename Real>
__device__ __forceinline__ void finish_ignored_row(const RowParams& p, const ForwardParams& f, uint32_t row) {
  static_cast<Real*>(f.loss)[row] = 0;
#pragma unroll
  for (int i = 0; i < 5; ++i) static_cast<Real*>(p.state)[i * p.rows + row] = 0;
  if (f.stats == nullptr) return;
#pragma unroll
  for (int i = 0; i < 5; ++i) static_cast<Real*>(f.stats)[i * p.rows + row] = 0;
  f.correct[row] = false;
}

}  // namespace mixce
