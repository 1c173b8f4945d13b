// What both passes over a row share: logits become exponents, and a row is walked in blocks that stay in L1.
#pragma once

#include "../rows.h"
#include "row_kernel_table.h"
#include "simd.h"

// Work on a block is a function of its own, so that its loop has all registers to itself.
#define MIXCE_BLOCK static __attribute__((noinline))

namespace mixce {
namespace {

// How logits become exponents: fixed for a row.
template <typename Real>
struct Transform {
  Real scale;  // of differences
  Softcap<Real> softcap;
};

template <typename Real>
MIXCE_INLINE Transform<Real> transform_of(const RowParams& p, int64_t row) {
  return {static_cast<Real>(row_scale<Real>(p, row)), softcap_of<Real>(p.options)};
}

MIXCE_INLINE Capped<FloatVector> capped(FloatVector::Reg x, const Softcap<float>& softcap) {
  using V = FloatVector;
  constexpr float kFactor = 2 * kLog2E<float>;
  const V::Reg u = V::mul(x, V::set(softcap.tanh_scale));
  const V::Reg d = V::sub(V::set(0.0f), V::magnitude(u));
  const Exp2Parts parts = exp2_parts(d, V::set(kFactor), V::set(-127.0f / kFactor));
  // expm1(-2|u|) = 2^n * p * f + (2^n - 1); tanh|u| = -expm1 / (expm1 + 2).
  const V::Reg expm1 = V::fma(V::mul(parts.power, parts.p), parts.f, V::sub(parts.power, V::set(1.0f)));
  const V::Reg inverse = V::div(V::set(1.0f), V::add(expm1, V::set(2.0f)));
  const V::Reg tanh_magnitude = V::mul(V::sub(V::set(0.0f), expm1), inverse);
  const V::Reg exponential = V::fma(V::mul(parts.power, parts.p), parts.f, parts.power);
  const V::Reg slope = V::mul(V::mul(V::set(4.0f), exponential), V::mul(inverse, inverse));
  return {V::mul(V::set(softcap.cap), V::with_sign_of(tanh_magnitude, u)), slope};
}

template <typename V>
MIXCE_INLINE typename V::Real first_lane(typename V::Reg reg) {
  typename V::Real lanes[V::kWidth];
  V::store(lanes, reg);
  return lanes[0];
}

template <typename V, typename T, bool kCap>
MIXCE_INLINE typename V::Real capped_scalar(typename V::Real x, const Softcap<typename V::Real>& softcap) {
  if constexpr (kCap) return first_lane<V>(capped(V::set(x), softcap).value);
  return x;
}

// The blocks of a row: body(begin, size) for each.
template <typename Body>
MIXCE_INLINE void walk_row(int64_t vocab_size, Body body) {
  for (int64_t begin = 0; begin < vocab_size; begin += kBlock) {
    body(begin, vocab_size - begin < kBlock ? vocab_size - begin : kBlock);
  }
}

// Bytes of a row that are on their way from memory beyond those that are read: hardware alone fetches too few
// ahead to keep memory busy while exponentials are computed.
constexpr int64_t kPrefetchBytes = 3072;

// Fetches into L2 the lines of the pair of vectors that is read kPrefetchBytes after the one at x.
template <typename V, typename T>
MIXCE_INLINE void prefetch_ahead(const T* x) {
  const char* const ahead = reinterpret_cast<const char*>(x) + kPrefetchBytes;
  constexpr int64_t kPairBytes = 2 * V::kWidth * sizeof(T);
  for (int64_t i = 0; i < kPairBytes; i += 64) V::prefetch(ahead + i);
}

// The n <= kWidth elements at x, in order, in a vector whose other lanes are 0.
template <typename V, typename T>
MIXCE_INLINE typename V::Reg load_edge(const T* x, int64_t n) {
  typename V::Real padded[V::kWidth] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = to_real(x[i]);
  return V::load(padded);
}

template <typename V, typename T>
MIXCE_INLINE void store_edge(T* out, typename V::Reg value, int64_t n) {
  typename V::Real padded[V::kWidth];
  V::store(padded, value);
  for (int64_t i = 0; i < n; ++i) from_real(padded[i], out + i);
}

}  // namespace
}  // namespace mixce
