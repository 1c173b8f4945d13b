// Rows of logits as vectors of 16 bytes, whatever their alignment, and the arithmetic on the numbers in them.
#pragma once

#include <cuda_runtime.h>
#include <float.h>

#include <ptx.cuh>
#include <type_traits>

#include "../rows.h"

namespace mixce {

// Calls body with std::integral_constants 0 to kCount - 1: a loop whose index is a compile-time number.
template <int kCount, int kFirst = 0, typename Body>
__device__ __forceinline__ void unroll(const Body& body) {
  if constexpr (kFirst < kCount) {
    body(std::integral_constant<int, kFirst>());
    unroll<kCount, kFirst + 1>(body);
  }
}

// How numbers of type T lie in a vector, and the type of their arithmetic.
template <typename T>
struct Format;

template <>
struct Format<float> {
  using Real = float;
  static constexpr int kWidth = 4;

  static __device__ __forceinline__ void unpack(uint4 v, float (&x)[4]) {
    x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y);
    x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
  }
  static __device__ __forceinline__ uint4 pack(const float (&x)[4]) {
    return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                      __float_as_uint(x[3]));
  }
  static __device__ __forceinline__ float to_real(float x) { return x; }
  static __device__ __forceinline__ float from_real(float x) { return x; }
};

template <>
struct Format<double> {
  using Real = double;
  static constexpr int kWidth = 2;

  static __device__ __forceinline__ void unpack(uint4 v, double (&x)[2]) {
    x[0] = __hiloint2double(static_cast<int>(v.y), static_cast<int>(v.x));
    x[1] = __hiloint2double(static_cast<int>(v.w), static_cast<int>(v.z));
  }
  static __device__ __forceinline__ uint4 pack(const double (&x)[2]) {
    return make_uint4(__double2loint(x[0]), __double2hiint(x[0]), __double2loint(x[1]), __double2hiint(x[1]));
  }
  static __device__ __forceinline__ double to_real(double x) { return x; }
  static __device__ __forceinline__ double from_real(double x) { return x; }
};

// What the two sixteen-bit formats share: four words with a pair each.
template <typename T, typename Pairs>
struct PairFormat {
  using Real = float;
  static constexpr int kWidth = 8;

  static __device__ __forceinline__ void unpack(uint4 v, float (&x)[8]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = Pairs::unpack_pair(words[i]);
      x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
  }
  static __device__ __forceinline__ uint4 pack(const float (&x)[8]) {
    return make_uint4(Pairs::pack_pair(x[0], x[1]), Pairs::pack_pair(x[2], x[3]),
                      Pairs::pack_pair(x[4], x[5]), Pairs::pack_pair(x[6], x[7]));
  }
  static __device__ __forceinline__ float to_real(T x) { return Pairs::unpack_pair(x.bits).x; }
  static __device__ __forceinline__ T from_real(float x) {
    return {static_cast<uint16_t>(Pairs::pack_pair(x, 0.0f))};
  }
};

template <>
struct Format<BFloat16> : PairFormat<BFloat16, Format<BFloat16>> {
  static __device__ __forceinline__ float2 unpack_pair(uint32_t pair) { return ptx::unpack_bf16x2(pair); }
  static __device__ __forceinline__ uint32_t pack_pair(float a, float b) { return ptx::pack_bf16x2(a, b); }
  static __device__ __forceinline__ uint32_t max_pair(uint32_t a, uint32_t b) {
    return ptx::max_bf16x2(a, b);
  }
};

template <>
struct Format<Half> : PairFormat<Half, Format<Half>> {
  static __device__ __forceinline__ float2 unpack_pair(uint32_t pair) { return ptx::unpack_f16x2(pair); }
  static __device__ __forceinline__ uint32_t pack_pair(float a, float b) { return ptx::pack_f16x2(a, b); }
  static __device__ __forceinline__ uint32_t max_pair(uint32_t a, uint32_t b) { return ptx::max_f16x2(a, b); }
};

// The largest number of some vectors; NaNs are passed over or, where there is nothing else, returned: the
// sums will meet them.
template <typename T, int kVectors>
__device__ __forceinline__ typename Format<T>::Real maximum_of(const uint4 (&vectors)[kVectors]) {
  using F = Format<T>;
  if constexpr (sizeof(T) == 2) {
    // Two at a time, before they are unpacked.
    uint32_t pair = vectors[0].x;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const uint4 v = vectors[i];
      pair = F::max_pair(pair, F::max_pair(F::max_pair(v.x, v.y), F::max_pair(v.z, v.w)));
    }
    const float2 two = F::unpack_pair(pair);
    return fmaxf(two.x, two.y);
  } else {
    typename F::Real x[F::kWidth];
    F::unpack(vectors[0], x);
    typename F::Real largest = x[0];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      F::unpack(vectors[i], x);
#pragma unroll
      for (int k = 0; k < F::kWidth; ++k) largest = fmax(x[k], largest);
    }
    return largest;
  }
}

// The aligned vectors that lie wholly in a row, elements [begin, end) of it. The elements before and after
// them, fewer than a vector on either side, are its edges.
template <typename T>
struct Body {
  const uint4* vectors;
  int count;
  int begin, end;
  int edges;  // how many there are

  // The element that is the row's i-th edge.
  __device__ __forceinline__ int edge(int i) const { return i < begin ? i : end + i - begin; }
};

template <typename T>
__device__ __forceinline__ Body<T> body_of(const T* row, int vocab_size) {
  constexpr int kWidth = Format<T>::kWidth;
  const int to_boundary = static_cast<int>(-reinterpret_cast<uintptr_t>(row) % sizeof(uint4) / sizeof(T));
  Body<T> body;
  body.begin = min(to_boundary, vocab_size);
  body.count = static_cast<unsigned>(vocab_size - body.begin) / kWidth;
  body.end = body.begin + body.count * kWidth;
  body.edges = body.begin + vocab_size - body.end;
  body.vectors = reinterpret_cast<const uint4*>(row + body.begin);
  return body;
}

// exp(z_i - z_j) for a difference of (capped) logits <= 0.
template <typename Real>
struct Exponential;
template <>
struct Exponential<float> {
  float rate;
  __device__ __forceinline__ explicit Exponential(double scale)
      : rate(static_cast<float>(scale * kLog2E<double>)) {}
  __device__ __forceinline__ float operator()(float d) const { return ptx::exp2_approx(d * rate); }
};
template <>
struct Exponential<double> {
  double scale;
  __device__ __forceinline__ explicit Exponential(double scale) : scale(scale) {}
  __device__ __forceinline__ double operator()(double d) const { return exp(scale * d); }
};

__device__ __forceinline__ Capped<Scalar<float>> capped(float x, const Softcap<float>& softcap) {
  const float u = softcap.tanh_scale * x;
  constexpr float kFactor = 2 * kLog2E<float>;
  // With the exponent's bias, so that the low bits become a power of 2.
  constexpr float kMagic = kRoundToInteger + 127.0f;
  const float unbounded = fabsf(u) * -kFactor;
  const float t = unbounded < -127.0f ? -127.0f : unbounded;  // lets a NaN pass
  const float shifted = t + kMagic;
  const float f = t - (shifted - kMagic);
  const float power = __uint_as_float(__float_as_uint(shifted) << 23), p = exp2_polynomial<Scalar<float>>(f);
  // expm1(-2|u|) = 2^n * p * f + (2^n - 1); tanh|u| = -expm1 / (expm1 + 2).
  const float expm1 = fmaf(power * p, f, power - 1.0f), exponential = fmaf(power * p, f, power);
  const float inverse = ptx::reciprocal_approx(expm1 + 2.0f);
  return {softcap.cap * copysignf(-expm1 * inverse, u), 4.0f * exponential * (inverse * inverse)};
}

}  // namespace mixce
