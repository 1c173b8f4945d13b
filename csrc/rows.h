// Where the numbers of a row lie, and how its results are stored. Host and device, with internal linkage: see
// mixce_math.h. `Index` is the type in which rows are counted.
#pragma once

#include "mixce_math.h"

namespace mixce {

template <typename Index>
MIXCE_INLINE int64_t row_offset(const RowLayout& layout, Index row) {
  const Index inner = static_cast<Index>(layout.inner);
  return (row / inner) * layout.outer_stride + (row % inner) * layout.inner_stride;
}

template <typename T, typename Index>
MIXCE_INLINE const T* logits_row(const RowParams& p, Index row) {
  return static_cast<const T*>(p.logits) + row_offset(p.logits_rows, row);
}

template <typename T, typename Index>
MIXCE_INLINE T* grad_row(const RowParams& p, Index row) {
  return static_cast<T*>(p.grad_logits) + row_offset(p.grad_rows, row);
}

template <typename Index>
MIXCE_INLINE int64_t target_at(const RowParams& p, Index row) {
  return p.targets_int64 ? static_cast<const int64_t*>(p.targets)[row]
                         : static_cast<int64_t>(static_cast<const int32_t*>(p.targets)[row]);
}

// The upstream gradient of a token's own loss.
template <typename Real, typename Index>
MIXCE_INLINE Real upstream_at(const RowParams& p, Index row) {
  const Real grad_loss =
      p.grad_loss == nullptr ? Real{1} : static_cast<const Real*>(p.grad_loss)[row * p.grad_loss_stride];
  if (p.token_scale == nullptr) return grad_loss;
  return static_cast<Real>(grad_loss * p.token_scale[row * p.token_scale_stride]);
}

// NaN unless it is positive, so that the row's results are.
template <typename Real, typename Index>
MIXCE_INLINE double temperature_at(const RowParams& p, Index row) {
  if (p.temperature == nullptr) return 1;
  const double temperature = static_cast<const Real*>(p.temperature)[row];
  return temperature > 0 ? temperature : NAN;
}

// The factor from a row's differences of (capped) logits to those of exponents.
template <typename Real, typename Index>
MIXCE_INLINE double row_scale(const RowParams& p, Index row) {
  return scale_of_differences(p.options) / temperature_at<Real>(p, row);
}

// A row's terms for its gradient, from its state, its scale and the upstream gradients; kEntropy: with that
// of the entropy.
template <typename Elementary, bool kEntropy, typename Real, typename Index>
MIXCE_INLINE GradTerms<double> grad_terms_at(const RowParams& p, Index row, const Real (&state)[kStateWidth],
                                             double scale) {
  const double factor = has_softcap(p.options) ? p.options.logit_scale * scale : scale;
  auto terms = grad_terms<Elementary>(state, upstream_at<Real>(p, row), factor);
  if constexpr (kEntropy) {
    const Real* const of_row = static_cast<const Real*>(p.entropy_state) + row;
    const Real entropy_state[kEntropyStateWidth] = {of_row[0], of_row[p.logits_rows.number]};
    const double grad_entropy = static_cast<const Real*>(p.grad_entropy)[row * p.grad_entropy_stride];
    add_entropy_grad<Elementary>(terms, state, entropy_state, grad_entropy, factor, scale);
  }
  return terms;
}

// The factor of a row of the gradient: 1 where it is ignored, since NaN or infinity must not multiply zeros.
template <typename Real, typename Index>
MIXCE_INLINE Real row_factor_at(const RowParams& p, Index row) {
  if (p.targets != nullptr && target_at(p, row) == p.options.ignore_index) return 1;
  return upstream_at<Real>(p, row);
}

template <typename Real, typename Index>
MIXCE_INLINE double eta_at(const ForwardParams& f, Index row) {
  return f.eta == nullptr ? f.eta_value : static_cast<const Real*>(f.eta)[row * f.eta_stride];
}

template <typename Real, typename Index>
MIXCE_INLINE Mixture mixture_at(const RowParams& p, const ForwardParams& f, Index row) {
  const double eta = eta_at<Real>(f, row);
  if (f.parameters == nullptr) return {eta, f.weighting, f.first, f.second};
  const Real* const parameters = static_cast<const Real*>(f.parameters);
  return {eta, f.weighting, parameters[row], parameters[p.logits_rows.number + row]};
}

// A row's entry of each of kWidth results [kWidth, rows], in the type Real.
template <typename Real, int kWidth, typename Number, typename Index>
MIXCE_INLINE void store_numbers(void* results, int64_t rows, Index row, const Number (&numbers)[kWidth]) {
  for (int i = 0; i < kWidth; ++i)
    static_cast<Real*>(results)[i * rows + row] = static_cast<Real>(numbers[i]);
}

template <typename Real, typename Index>
MIXCE_INLINE void store_loss(const RowParams& p, const ForwardParams& f, Index row, double loss,
                             const Real (&state)[kStateWidth]) {
  static_cast<Real*>(f.losses)[row] = static_cast<Real>(loss);
  if (p.state != nullptr) store_numbers<Real>(p.state, p.logits_rows.number, row, state);
}

template <typename Real, typename Index>
MIXCE_INLINE void load_state(const RowParams& p, Index row, Real (&state)[kStateWidth]) {
  for (int i = 0; i < kStateWidth; ++i) {
    state[i] = static_cast<const Real*>(p.state)[i * p.logits_rows.number + row];
  }
}

// `first_of_largest`: no logit of the row beats the target's.
template <typename Real, typename Index>
MIXCE_INLINE void store_stats(const RowParams& p, const ForwardParams& f, Index row, const TokenTerms& terms,
                              const RowSums& sums, bool first_of_largest) {
  const double stats[kStatsWidth] = {terms.nll, terms.q,          terms.weight,
                                     terms.lse, entropy_of(sums), sums.collision};
  store_numbers<Real>(f.stats, p.logits_rows.number, row, stats);
  f.correct[row] = first_of_largest && terms.nll == terms.nll;
  if (p.entropy_state == nullptr) return;
  const double u = sums.expected_shifted;
  const double entropy_state[kEntropyStateWidth] = {u, terms.q == 0 ? 0 : terms.q * (sums.d_target - u)};
  store_numbers<Real>(p.entropy_state, p.logits_rows.number, row, entropy_state);
}

// Results of an ignored row, all 0.
template <typename Real, typename Index>
MIXCE_INLINE void store_ignored_row(const RowParams& p, const ForwardParams& f, Index row) {
  const Real state[kStateWidth] = {}, stats[kStatsWidth] = {}, entropy_state[kEntropyStateWidth] = {};
  store_loss<Real>(p, f, row, 0, state);
  if (f.stats == nullptr) return;
  store_numbers<Real>(f.stats, p.logits_rows.number, row, stats);
  f.correct[row] = false;
  if (p.entropy_state != nullptr)
    store_numbers<Real>(p.entropy_state, p.logits_rows.number, row, entropy_state);
}

}  // namespace mixce
