// Numbers of storage types, one at a time. Host and device, with internal linkage: see mixce_math.h.
#pragma once

#include <string.h>

#include "mixce_math.h"

namespace mixce {

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

// Number i of a type that is known at run time alone.
MIXCE_INLINE double number_at(const void* numbers, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kBFloat16:
      return to_real(static_cast<const BFloat16*>(numbers)[i]);
    case DType::kFloat16:
      return to_real(static_cast<const Half*>(numbers)[i]);
    case DType::kFloat64:
      return static_cast<const double*>(numbers)[i];
    case DType::kInt32:
      return static_cast<const int32_t*>(numbers)[i];
    case DType::kInt64:
      return static_cast<double>(static_cast<const int64_t*>(numbers)[i]);
    default:
      return static_cast<const float*>(numbers)[i];
  }
}

}  // namespace mixce
