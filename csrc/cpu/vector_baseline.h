// Four float32 lanes by the compiler's vector types: SSE2 on x86-64, NEON on aarch64. Included by simd.h
// alone.
#pragma once

#include "scalar.h"

namespace mixce {
namespace {

struct FloatVector {
  typedef float Reg __attribute__((vector_size(16)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  using Real = float;
  static constexpr int kWidth = 4;

  MIXCE_INLINE Reg set(float value) { return Reg{value, value, value, value}; }
  template <typename T>
  MIXCE_INLINE Reg load(const T* in) {
    return Reg{to_real(in[0]), to_real(in[1]), to_real(in[2]), to_real(in[3])};
  }
  template <typename T>
  MIXCE_INLINE void store(T* out, Reg value) {
    for (int i = 0; i < kWidth; ++i) from_real(value[i], out + i);
  }
  MIXCE_INLINE Reg add(Reg a, Reg b) { return a + b; }
  MIXCE_INLINE Reg sub(Reg a, Reg b) { return a - b; }
  MIXCE_INLINE Reg mul(Reg a, Reg b) { return a * b; }
  MIXCE_INLINE Reg div(Reg a, Reg b) { return a / b; }
  MIXCE_INLINE Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  MIXCE_INLINE Reg fms(Reg a, Reg b, Reg c) { return a * b - c; }
  MIXCE_INLINE Reg max(Reg a, Reg b) { return a > b ? a : b; }
  template <int bits>
  MIXCE_INLINE Reg shift_left(Reg a) {
    return reinterpret_cast<Reg>(reinterpret_cast<Bits>(a) << bits);
  }
  MIXCE_INLINE Reg magnitude(Reg a) { return reinterpret_cast<Reg>(reinterpret_cast<Bits>(a) & 0x7fffffffu); }
  MIXCE_INLINE Reg with_sign_of(Reg a, Reg sign) {
    return reinterpret_cast<Reg>(reinterpret_cast<Bits>(a) | (reinterpret_cast<Bits>(sign) & 0x80000000u));
  }
  using Bits16 = uint16_t;
  static constexpr int kWidth16 = 1;
  MIXCE_INLINE Bits16 set_bits16(int16_t bits) { return static_cast<Bits16>(bits); }
  MIXCE_INLINE Bits16 load_bits16(const void* in) { return *static_cast<const uint16_t*>(in); }
  MIXCE_INLINE void store_bits16(void* out, Bits16 bits) { *static_cast<uint16_t*>(out) = bits; }
  MIXCE_INLINE Bits16 max_signed(Bits16 a, Bits16 b) {
    return static_cast<int16_t>(a) > static_cast<int16_t>(b) ? a : b;
  }
  MIXCE_INLINE Bits16 min_unsigned(Bits16 a, Bits16 b) { return a < b ? a : b; }

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

}  // namespace
}  // namespace mixce
