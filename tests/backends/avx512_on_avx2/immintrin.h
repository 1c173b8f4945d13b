// Found before the compiler's own <immintrin.h>: AVX-512 intrinsics executed with AVX2, by SIMDe and by hand
// where it has none, so that the AVX-512 kernels run on a machine without AVX-512.
#pragma once

#include_next <immintrin.h>
#include <stdint.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

static inline __m512 emulated_cvtph_ps(__m256i bits) {
  const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(bits));
  const __m256 high = _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1));
  __m512 result;
  __builtin_memcpy(&result, &low, sizeof low);
  __builtin_memcpy(reinterpret_cast<char*>(&result) + sizeof low, &high, sizeof high);
  return result;
}

static inline __m256i emulated_cvtps_ph(__m512 values) {
  __m256 low, high;
  __builtin_memcpy(&low, &values, sizeof low);
  __builtin_memcpy(&high, reinterpret_cast<const char*>(&values) + sizeof low, sizeof high);
  const __m128i low_bits = _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT);
  const __m128i high_bits = _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low_bits), high_bits, 1);
}

// Ordinary stores, but as strict about alignment as the streaming ones.
static inline void emulated_stream(void* out, const void* value) {
  if (reinterpret_cast<uintptr_t>(out) % 64 != 0) __builtin_trap();
  __builtin_memcpy(out, value, 64);
}
static inline void emulated_stream_ps(float* out, __m512 value) { emulated_stream(out, &value); }
static inline void emulated_stream_si512(__m512i* out, __m512i value) { emulated_stream(out, &value); }
static inline void emulated_stream_si256(__m256i* out, __m256i value) {
  if (reinterpret_cast<uintptr_t>(out) % 32 != 0) __builtin_trap();
  __builtin_memcpy(out, &value, 32);
}

#define _mm512_stream_ps(out, value) emulated_stream_ps(out, value)
#define _mm512_stream_si512(out, value) emulated_stream_si512(out, value)
#define _mm256_stream_si256(out, value) emulated_stream_si256(out, value)
#define _mm512_cvtph_ps(bits) emulated_cvtph_ps(bits)
#define _mm512_cvtps_ph(values, rounding) emulated_cvtps_ph(values)
