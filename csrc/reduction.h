// From the losses of tokens to the loss: weights, divisor and sums, in float64. Host and device, with
// internal linkage: see mixce_math.h. The twin of mixce_kernels/reduction.py.
#pragma once

#include "numbers.h"

namespace mixce {

// Over the tokens that are not ignored.
struct Totals {
  double loss, weight;
};

MIXCE_INLINE double weight_at(const ReductionParams& r, int64_t token) {
  const int64_t target = r.targets_int64
                             ? static_cast<const int64_t*>(r.targets)[token]
                             : static_cast<int64_t>(static_cast<const int32_t*>(r.targets)[token]);
  // Whatever stands at an ignored token does not matter.
  if (target == r.ignore_index) return 0;
  return r.weights == nullptr ? 1 : number_at(r.weights, r.weights_dtype, token * r.weights_stride);
}

template <typename Real>
MIXCE_INLINE void add_token(const ReductionParams& r, int64_t token, Totals& totals) {
  const double weight = weight_at(r, token);
  totals.weight += weight;
  if (r.losses != nullptr) totals.loss += static_cast<const Real*>(r.losses)[token] * weight;
}

MIXCE_INLINE void add_totals(Totals& totals, const Totals& others) {
  totals.loss += others.loss;
  totals.weight += others.weight;
}

// What the sum is divided by: 1 instead of 0.
MIXCE_INLINE double divisor_of(const ReductionParams& r, const Totals& totals) {
  if (!r.mean) return 1;
  double divisor = totals.weight;
  if (r.num_items != nullptr) {
    divisor = number_at(r.num_items, r.num_items_dtype, 0);
  } else if (r.num_items_value == r.num_items_value) {
    divisor = r.num_items_value;
  }
  return divisor == 0 ? 1 : divisor;
}

// What is stored once.
template <typename Real>
MIXCE_INLINE void store_total(const ReductionParams& r, const Totals& totals, double divisor) {
  if (r.sums && r.loss != nullptr) *static_cast<Real*>(r.loss) = static_cast<Real>(totals.loss / divisor);
  if (r.weights == nullptr && r.token_scale != nullptr) *r.token_scale = 1 / divisor;
}

// What is stored for each token, where `stores_tokens` says so.
MIXCE_INLINE bool stores_tokens(const ReductionParams& r) { return r.weights != nullptr; }
template <typename Real>
MIXCE_INLINE void store_token(const ReductionParams& r, int64_t token, double divisor) {
  const double weight = weight_at(r, token);
  if (r.token_scale != nullptr) r.token_scale[token] = weight / divisor;
  if (!r.sums && r.loss != nullptr) {
    static_cast<Real*>(r.loss)[token] = static_cast<Real>(static_cast<const Real*>(r.losses)[token] * weight);
  }
}

}  // namespace mixce
