// Vectors of one instruction set behind one set of names. Include with exactly one of MIXCE_AVX512, MIXCE_AVX2 defined,
// or none for the baseline. Everything has internal linkage: see mixce_math.h.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../mixce_math.h"

#if defined(MIXCE_AVX512) || defined(MIXCE_AVX2)
#include <immintrin.h>
#endif

namespace mixce {
namespace {

// Storage types of half precision: bits alone.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

MIXCE_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
MIXCE_INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

MIXCE_INLINE float to_real(float value) { return value; }
MIXCE_INLINE double to_real(double value) { return value; }
MIXCE_INLINE float to_real(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
MIXCE_INLINE float to_real(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // The exponent's bias moves by 112; the multiplication also makes subnormals normal.
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}

MIXCE_INLINE void from_real(float value, float* out) { *out = value; }
MIXCE_INLINE void from_real(double value, double* out) { *out = value; }
// Round to nearest, ties to even. NaNs come with a payload in the upper bits (see row_kernels.h).
MIXCE_INLINE void from_real(float value, BFloat16* out) {
  const uint32_t bits = bits_of(value);
  out->bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
MIXCE_INLINE void from_real(float value, Half* out) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;
  } else if (rest >= 0x477ff000u) {
    half = 0x7c00u;  // rounds to infinity
  } else if (rest < 0x38800000u) {
    half = bits_of(float_of(rest) + 0.5f) - 0x3f000000u;  // subnormal: the addition rounds
  } else {
    half = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

// Coefficients of 2^f = 1 + f * P(f) on [-1/2, 1/2], least maximal relative error at that degree.
template <int degree>
struct Exp2Polynomial;
template <>
struct Exp2Polynomial<3> {  // 1.0e-4, for gradients stored as bfloat16 (half an ulp: 2e-3)
  static constexpr float kCoefficients[] = {0x1.62f5fap-1f, 0x1.f00c4cp-3f, 0x1.c2a216p-5f};
};
template <>
struct Exp2Polynomial<4> {  // 2.9e-6, for gradients stored as float16 (half an ulp: 2.4e-4)
  static constexpr float kCoefficients[] = {0x1.62e12cp-1f, 0x1.ec0378p-3f, 0x1.c9fc46p-5f, 0x1.3a02ccp-7f};
};
template <>
struct Exp2Polynomial<5> {  // 1.6e-7 in float32 arithmetic
  static constexpr float kCoefficients[] = {0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b752p-5f, 0x1.3cea88p-7f,
                                            0x1.5bba14p-10f};
};
template <>
struct Exp2Polynomial<6> {  // 8e-8 in float32 arithmetic
  static constexpr float kCoefficients[] = {0x1.62e430p-1f, 0x1.ebfbdcp-3f, 0x1.c6aee8p-5f, 0x1.3b2d4cp-7f,
                                            0x1.5f3e52p-10f, 0x1.41fbbcp-13f};
};

#if defined(MIXCE_AVX512)

struct FloatVector {
  using Reg = __m512;
  using Real = float;
  static constexpr int kWidth = 16;

  MIXCE_INLINE Reg set(float value) { return _mm512_set1_ps(value); }
  MIXCE_INLINE Reg load(const float* in) { return _mm512_loadu_ps(in); }
  MIXCE_INLINE Reg load(const BFloat16* in) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  MIXCE_INLINE Reg load(const Half* in) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
  }
  MIXCE_INLINE void store(float* out, Reg value) { _mm512_storeu_ps(out, value); }
  MIXCE_INLINE void store(BFloat16* out, Reg value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), to_bfloat16(value));
  }
  MIXCE_INLINE void store(Half* out, Reg value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), to_half(value));
  }
  MIXCE_INLINE void stream(float* out, Reg value) { _mm512_stream_ps(out, value); }
  MIXCE_INLINE void stream(BFloat16* out, Reg value) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out), to_bfloat16(value));
  }
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
  MIXCE_INLINE Reg shift_into_exponent(Reg a) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a), 23));
  }
  MIXCE_INLINE Reg magnitude(Reg a) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff)));
  }
  MIXCE_INLINE Reg with_sign_of(Reg a, Reg sign) {
    const __m512i bit = _mm512_and_si512(_mm512_castps_si512(sign), _mm512_set1_epi32(INT32_MIN));
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(a), bit));
  }

 private:
  MIXCE_INLINE __m256i to_bfloat16(Reg value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
  MIXCE_INLINE __m256i to_half(Reg value) {
    return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

#elif defined(MIXCE_AVX2)

struct FloatVector {
  using Reg = __m256;
  using Real = float;
  static constexpr int kWidth = 8;

  MIXCE_INLINE Reg set(float value) { return _mm256_set1_ps(value); }
  MIXCE_INLINE Reg load(const float* in) { return _mm256_loadu_ps(in); }
  MIXCE_INLINE Reg load(const BFloat16* in) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  MIXCE_INLINE Reg load(const Half* in) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
  }
  MIXCE_INLINE void store(float* out, Reg value) { _mm256_storeu_ps(out, value); }
  MIXCE_INLINE void store(BFloat16* out, Reg value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), to_bfloat16(value));
  }
  MIXCE_INLINE void store(Half* out, Reg value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), to_half(value));
  }
  MIXCE_INLINE void stream(float* out, Reg value) { _mm256_stream_ps(out, value); }
  MIXCE_INLINE void stream(BFloat16* out, Reg value) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(out), to_bfloat16(value));
  }
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
  MIXCE_INLINE Reg shift_into_exponent(Reg a) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), 23));
  }
  MIXCE_INLINE Reg magnitude(Reg a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  MIXCE_INLINE Reg with_sign_of(Reg a, Reg sign) {
    return _mm256_or_ps(a, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
  }

 private:
  MIXCE_INLINE __m128i to_bfloat16(Reg value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i shifted = _mm256_srli_epi32(rounded, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(shifted), _mm256_extracti128_si256(shifted, 1));
  }
  MIXCE_INLINE __m128i to_half(Reg value) {
    return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

#else

// Vectors of the compiler's own, four lanes: SSE2 on x86-64, NEON on aarch64.
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
  template <typename T>
  MIXCE_INLINE void stream(T* out, Reg value) {
    store(out, value);
  }
  MIXCE_INLINE Reg add(Reg a, Reg b) { return a + b; }
  MIXCE_INLINE Reg sub(Reg a, Reg b) { return a - b; }
  MIXCE_INLINE Reg mul(Reg a, Reg b) { return a * b; }
  MIXCE_INLINE Reg div(Reg a, Reg b) { return a / b; }
  MIXCE_INLINE Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  MIXCE_INLINE Reg fms(Reg a, Reg b, Reg c) { return a * b - c; }
  MIXCE_INLINE Reg max(Reg a, Reg b) { return a > b ? a : b; }
  MIXCE_INLINE Reg shift_into_exponent(Reg a) { return reinterpret_cast<Reg>(reinterpret_cast<Bits>(a) << 23); }
  MIXCE_INLINE Reg magnitude(Reg a) { return reinterpret_cast<Reg>(reinterpret_cast<Bits>(a) & 0x7fffffffu); }
  MIXCE_INLINE Reg with_sign_of(Reg a, Reg sign) {
    return reinterpret_cast<Reg>(reinterpret_cast<Bits>(a) | (reinterpret_cast<Bits>(sign) & 0x80000000u));
  }
};

#endif

// 2^(factor * d) = power * (1 + p * f), with power = 2^n for the nearest integer n, 0 from n = -127 down. d is clamped at
// `lowest` = -127 / factor, where it must not exceed 127; NaN stays NaN.
struct Exp2Parts {
  FloatVector::Reg power, p, f;
};
template <int degree>
MIXCE_INLINE Exp2Parts exp2_parts(FloatVector::Reg d, FloatVector::Reg factor, FloatVector::Reg lowest) {
  using V = FloatVector;
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits, here with the exponent's bias.
  const V::Reg magic = V::set(0x1.8p23f + 127.0f);
  d = V::max(lowest, d);  // the second operand survives a NaN
  const V::Reg shifted = V::fma(d, factor, magic);
  const V::Reg f = V::fms(d, factor, V::sub(shifted, magic));
  V::Reg p = V::set(Exp2Polynomial<degree>::kCoefficients[degree - 1]);
  for (int i = degree - 2; i >= 0; --i) p = V::fma(p, f, V::set(Exp2Polynomial<degree>::kCoefficients[i]));
  return {V::shift_into_exponent(shifted), p, f};
}

// One float64 at a time, by the C library: for float64 logits, where accuracy is wanted and speed is not.
struct DoubleVector {
  using Reg = double;
  using Real = double;
  static constexpr int kWidth = 1;

  MIXCE_INLINE Reg set(double value) { return value; }
  MIXCE_INLINE Reg load(const double* in) { return *in; }
  MIXCE_INLINE void store(double* out, Reg value) { *out = value; }
  MIXCE_INLINE void stream(double* out, Reg value) { *out = value; }
  MIXCE_INLINE Reg add(Reg a, Reg b) { return a + b; }
  MIXCE_INLINE Reg sub(Reg a, Reg b) { return a - b; }
  MIXCE_INLINE Reg mul(Reg a, Reg b) { return a * b; }
  MIXCE_INLINE Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  MIXCE_INLINE Reg fms(Reg a, Reg b, Reg c) { return a * b - c; }
  MIXCE_INLINE Reg max(Reg a, Reg b) { return a > b ? a : b; }
};

}  // namespace
}  // namespace mixce
