// Sixteen float32 lanes of AVX-512 F, BW, DQ and VL. Included by simd.h alone.
#pragma once

#include <immintrin.h>

#include "scalar.h"

namespace mixce {
namespace {

struct FloatVector {
  using Reg = __m512;
  using Real = float;
  static constexpr int kWidth = 16;

  MIXCE_INLINE Reg set(float value) { return _mm512_set1_ps(value); }
  MIXCE_INLINE Reg load(const float* in) { return _mm512_loadu_ps(in); }
  MIXCE_INLINE Reg load(const Half* in) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
  }
  MIXCE_INLINE void store(float* out, Reg value) { _mm512_storeu_ps(out, value); }
  MIXCE_INLINE void store(Half* out, Reg value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), to_half(value));
  }
  MIXCE_INLINE void stream(float* out, Reg value) { _mm512_stream_ps(out, value); }
  MIXCE_INLINE void stream(Half* out, Reg value) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out), to_half(value));
  }
  MIXCE_INLINE Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  MIXCE_INLINE Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  MIXCE_INLINE Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  MIXCE_INLINE Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  MIXCE_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  MIXCE_INLINE Reg fms(Reg a, Reg b, Reg c) { return _mm512_fmsub_ps(a, b, c); }
  MIXCE_INLINE Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  template <int bits>
  MIXCE_INLINE Reg shift_left(Reg a) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a), bits));
  }
  MIXCE_INLINE Reg add_bits(Reg a, Reg b) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
  // The bits of 2^(i / 8) less i << 20, for i in the three lowest bits of each lane; the fourth picks a copy.
  MIXCE_INLINE Reg exp2_eighths(Reg index) {
    const __m512i table = _mm512_setr_epi32(
        0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7,
        0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi32(_mm512_castps_si512(index), table));
  }
  MIXCE_INLINE Reg magnitude(Reg a) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff)));
  }
  MIXCE_INLINE Reg with_sign_of(Reg a, Reg sign) {
    const __m512i bit = _mm512_and_si512(_mm512_castps_si512(sign), _mm512_set1_epi32(INT32_MIN));
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(a), bit));
  }

  // Sixteen-bit lanes, as bits.
  using Bits16 = __m512i;
  static constexpr int kWidth16 = 32;
  MIXCE_INLINE Bits16 set_bits16(int16_t bits) { return _mm512_set1_epi16(bits); }
  MIXCE_INLINE Bits16 load_bits16(const void* in) { return _mm512_loadu_si512(in); }
  MIXCE_INLINE void store_bits16(void* out, Bits16 bits) { _mm512_storeu_si512(out, bits); }
  MIXCE_INLINE Bits16 max_signed(Bits16 a, Bits16 b) { return _mm512_max_epi16(a, b); }
  MIXCE_INLINE Bits16 min_unsigned(Bits16 a, Bits16 b) { return _mm512_min_epu16(a, b); }

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
    const __m512i bits = _mm512_loadu_si512(in);
    *a = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    *b = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  template <typename T>
  MIXCE_INLINE void store_pair(T* out, Reg a, Reg b) {
    store(out, a);
    store(out + kWidth, b);
  }
  MIXCE_INLINE void store_pair(BFloat16* out, Reg a, Reg b) {
    _mm512_storeu_si512(out, interleaved_bfloat16(a, b));
  }
  template <typename T>
  MIXCE_INLINE void stream_pair(T* out, Reg a, Reg b) {
    stream(out, a);
    stream(out + kWidth, b);
  }
  MIXCE_INLINE void stream_pair(BFloat16* out, Reg a, Reg b) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), interleaved_bfloat16(a, b));
  }
  MIXCE_INLINE void prefetch(const void* in) { _mm_prefetch(static_cast<const char*>(in), _MM_HINT_T1); }

 private:
  // Rounded to nearest, ties away from zero, with the result in the upper half of each lane.
  MIXCE_INLINE __m512i rounded_bfloat16(Reg value) {
    return _mm512_add_epi32(_mm512_castps_si512(value), _mm512_set1_epi32(0x8000));
  }
  MIXCE_INLINE __m512i interleaved_bfloat16(Reg a, Reg b) {
    const __m512i low = _mm512_srli_epi32(rounded_bfloat16(a), 16);
    return _mm512_mask_blend_epi16(0xaaaaaaaau, low, rounded_bfloat16(b));
  }
  MIXCE_INLINE __m256i to_half(Reg value) {
    return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

template <>
constexpr bool FloatVector::kPairsInOrder<BFloat16> = false;

}  // namespace
}  // namespace mixce
