// The rounding to storage types, one number at a time. Internal linkage throughout: see mixce_math.h.
#pragma once

#include "../numbers.h"

namespace mixce {
namespace {

MIXCE_INLINE void from_real(float value, float* out) { *out = value; }
MIXCE_INLINE void from_real(double value, double* out) { *out = value; }
// Rounds to nearest, ties away from zero: for a computed gradient as near as ties to even, and cheaper. A NaN
// has only zeros in its lower bits (see row_grad.h).
MIXCE_INLINE void from_real(float value, BFloat16* out) {
  out->bits = static_cast<uint16_t>((bits_of(value) + 0x8000u) >> 16);
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

}  // namespace
}  // namespace mixce
