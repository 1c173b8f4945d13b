// Vectors and exponentials of one instruction set behind one set of names. Include with MIXCE_AVX512 or
// MIXCE_AVX2 defined, or neither for the baseline.
#pragma once

#if defined(MIXCE_AVX512)
#include "vector_avx512.h"
#elif defined(MIXCE_AVX2)
#include "vector_avx2.h"
#else
#include "vector_baseline.h"
#endif

namespace mixce {
namespace {

// 2^(factor * d) = power * (1 + p * f), with power = 2^n for the nearest integer n, 0 from n = -127 down. d
// <= 0 is clamped at `lowest` = -127 / factor; NaN stays NaN. Relative error 8e-8.
struct Exp2Parts {
  FloatVector::Reg power, p, f;
};
MIXCE_INLINE Exp2Parts exp2_parts(FloatVector::Reg d, FloatVector::Reg factor, FloatVector::Reg lowest) {
  using V = FloatVector;
  // With the exponent's bias, so that the low bits become a power of 2.
  const V::Reg magic = V::set(kRoundToInteger + 127.0f);
  d = V::max(lowest, d);  // the second operand survives a NaN
  const V::Reg shifted = V::fma(d, factor, magic);
  const V::Reg f = V::fms(d, factor, V::sub(shifted, magic));
  return {V::shift_left<23>(shifted), exp2_polynomial<V>(f), f};
}

template <typename V>
struct Exponential;

// exp(scale * d) for d <= 0, 0 from about 2^-127 down; exact at 0, NaN stays NaN.
template <>
struct Exponential<FloatVector> {
  using V = FloatVector;
  V::Reg factor, lowest;

#if defined(MIXCE_AVX512) || defined(MIXCE_AVX2)
  // A member, not a constant: the compiler would spend a second register on its negative.
  V::Reg magic = V::set(kRoundToInteger);

  // 2^(n / 8 + f / 8) with 2^(i / 8), i = n mod 8, from a table in a register: two multiply-adds fewer than a
  // polynomial on [-1/2, 1/2], whose two units are what limits the pass. Relative error 1.2e-7.
  explicit Exponential(float scale) {
    const float eighths = scale * (8 * kLog2E<float>);
    factor = V::set(eighths);
    lowest = V::set(-8 * 127.0f / eighths);
  }
  V::Reg of(V::Reg d) const {
    d = V::max(lowest, d);
    const V::Reg shifted = V::fma(d, factor, magic);
    const V::Reg f = V::fms(d, factor, V::sub(shifted, magic));
    // n << 20 puts n / 8 into the exponent and i << 20 beside it, which the table's entries lack.
    const V::Reg power = V::add_bits(V::exp2_eighths(shifted), V::shift_left<20>(shifted));
    V::Reg p = V::fma(f, V::set(0x1.c6a004p-14f), V::set(0x1.ec0c32p-9f));
    p = V::fma(f, p, V::set(0x1.62e432p-4f));
    return V::fma(V::mul(f, power), p, power);
  }
#else
  explicit Exponential(float scale) {
    factor = V::set(scale * kLog2E<float>);
    lowest = V::set(-127.0f / (scale * kLog2E<float>));
  }
  V::Reg of(V::Reg d) const {
    const Exp2Parts parts = exp2_parts(d, factor, lowest);
    return V::fma(V::mul(parts.f, parts.power), parts.p, parts.power);
  }
#endif
};

// One float64 at a time, by the C library: for float64 logits, where accuracy is wanted and speed is not.
struct DoubleVector {
  using Reg = double;
  using Real = double;
  static constexpr int kWidth = 1;

  MIXCE_INLINE Reg set(double value) { return value; }
  MIXCE_INLINE Reg load(const double* in) { return *in; }
  MIXCE_INLINE void store(double* out, Reg value) { *out = value; }
  MIXCE_INLINE Reg add(Reg a, Reg b) { return a + b; }
  MIXCE_INLINE Reg sub(Reg a, Reg b) { return a - b; }
  MIXCE_INLINE Reg mul(Reg a, Reg b) { return a * b; }
  MIXCE_INLINE Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  MIXCE_INLINE Reg fms(Reg a, Reg b, Reg c) { return a * b - c; }
  MIXCE_INLINE Reg max(Reg a, Reg b) { return a > b ? a : b; }
  template <typename T>
  static constexpr bool kPairsInOrder = true;
  template <typename T>
  MIXCE_INLINE void load_pair(const T* in, Reg* a, Reg* b) {
    *a = load(in);
    *b = load(in + kWidth);
  }
  template <typename T>
  MIXCE_INLINE void store_pair(T* out, Reg a, Reg b) {
    store(out, a);
    store(out + kWidth, b);
  }
  template <typename T>
  MIXCE_INLINE void stream_pair(T* out, Reg a, Reg b) {
    store_pair(out, a, b);
  }
  MIXCE_INLINE void prefetch(const void* in) { __builtin_prefetch(in, 0, 2); }
};

template <>
struct Exponential<DoubleVector> {
  double scale;

  explicit Exponential(double scale) : scale(scale) {}
  double of(double d) const { return exp(scale * d); }
};

}  // namespace
}  // namespace mixce
