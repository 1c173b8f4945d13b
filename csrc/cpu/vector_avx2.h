// Eight float32 lanes of AVX2, FMA and F16C. Included by simd.h alone.
#pragma once

#include <immintrin.h>

#include "scalar.h"

namespace mixce {
namespace {

struct FloatVector {
  using Reg = __m256;
  using Real = float;
  static constexpr int kWidth = 8;

  MIXCE_INLINE Reg set(float value) { return _mm256_set1_ps(value); }
  MIXCE_INLINE Reg load(const float* in) { return _mm256_loadu_ps(in); }
  MIXCE_INLINE Reg load(const Half* in) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
  }
  MIXCE_INLINE void store(float* out, Reg value) { _mm256_storeu_ps(out, value); }
  MIXCE_INLINE void store(Half* out, Reg value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), to_half(value));
  }
  MIXCE_INLINE void stream(float* out, Reg value) { _mm256_stream_ps(out, value); }
  MIXCE_INLINE void stream(Half* out, Reg value) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(out), to_half(value));
  }
  MIXCE_INLINE Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  MIXCE_INLINE Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  MIXCE_INLINE Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  MIXCE_INLINE Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  MIXCE_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  MIXCE_INLINE Reg fms(Reg a, Reg b, Reg c) { return _mm256_fmsub_ps(a, b, c); }
  MIXCE_INLINE Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  template <int bits>
  MIXCE_INLINE Reg shift_left(Reg a) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), bits));
  }
  MIXCE_INLINE Reg add_bits(Reg a, Reg b) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
  }
  // The bits of 2^(i / 8) less i << 20, for i in the three lowest bits of each lane.
  MIXCE_INLINE Reg exp2_eighths(Reg index) {
    const __m256i table = _mm256_setr_epi32(0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3,
                                            0x3f75672a, 0x3f7744fd, 0x3f7ac0c7);
    return _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(table, _mm256_castps_si256(index)));
  }
  MIXCE_INLINE Reg magnitude(Reg a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  MIXCE_INLINE Reg with_sign_of(Reg a, Reg sign) {
    return _mm256_or_ps(a, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
  }

  // Sixteen-bit lanes, as bits.
  using Bits16 = __m256i;
  static constexpr int kWidth16 = 16;
  MIXCE_INLINE Bits16 set_bits16(int16_t bits) { return _mm256_set1_epi16(bits); }
  MIXCE_INLINE Bits16 load_bits16(const void* in) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
  }
  MIXCE_INLINE void store_bits16(void* out, Bits16 bits) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bits);
  }
  MIXCE_INLINE Bits16 max_signed(Bits16 a, Bits16 b) { return _mm256_max_epi16(a, b); }
  MIXCE_INLINE Bits16 min_unsigned(Bits16 a, Bits16 b) { return _mm256_min_epu16(a, b); }

  // Two vectors at once, in an order of their own that load_pair and store_pair share: bfloat16 comes as even
  // and odd elements, which needs no permutation.
  template <typename T>
  static constexpr bool kPairsInOrder = true;
  template <typename T>
  MIXCE_INLINE void load_pair(const T* in, Reg* a, Reg* b) {
    *a = load(in);
    *b = load(in + kWidth);
  }
  MIXCE_INLINE void load_pair(const BFloat16* in, Reg* a, Reg* b) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
    *a = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
    *b = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  template <typename T>
  MIXCE_INLINE void store_pair(T* out, Reg a, Reg b) {
    store(out, a);
    store(out + kWidth, b);
  }
  MIXCE_INLINE void store_pair(BFloat16* out, Reg a, Reg b) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), interleaved_bfloat16(a, b));
  }
  template <typename T>
  MIXCE_INLINE void stream_pair(T* out, Reg a, Reg b) {
    stream(out, a);
    stream(out + kWidth, b);
  }
  MIXCE_INLINE void stream_pair(BFloat16* out, Reg a, Reg b) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out), interleaved_bfloat16(a, b));
  }
  MIXCE_INLINE void prefetch(const void* in) { _mm_prefetch(static_cast<const char*>(in), _MM_HINT_T1); }

 private:
  // Rounded to nearest, ties away from zero, with the result in the upper half of each lane.
  MIXCE_INLINE __m256i rounded_bfloat16(Reg value) {
    return _mm256_add_epi32(_mm256_castps_si256(value), _mm256_set1_epi32(0x8000));
  }
  MIXCE_INLINE __m256i interleaved_bfloat16(Reg a, Reg b) {
    return _mm256_blend_epi16(_mm256_srli_epi32(rounded_bfloat16(a), 16), rounded_bfloat16(b), 0xaa);
  }
  MIXCE_INLINE __m128i to_half(Reg value) {
    return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

template <>
constexpr bool FloatVector::kPairsInOrder<BFloat16> = false;

}  // namespace
}  // namespace mixce
