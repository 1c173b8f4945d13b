// The functions of csrc/cuda/ptx.cuh with their meaning on a CPU.
#pragma once

#include <cuda_runtime.h>

namespace mixce::ptx {

using cuda_on_cpu::bit_cast;

inline unsigned char* shared_memory() {
  return reinterpret_cast<unsigned char*>(cuda_on_cpu::current->block->shared);
}

template <typename Params>
inline Params read_at_entry(const Params& params) {
  static_assert(sizeof(Params) % sizeof(uint64_t) == 0, "parameters are read in words of 8 bytes");
  return params;
}

inline const void* behind(const void* address, int bytes) {
  return static_cast<const char*>(address) + bytes;
}
inline void* behind(void* address, int bytes) { return static_cast<char*>(address) + bytes; }

template <int kOffset = 0>
inline uint4 load_streaming(const void* from) {
  from = behind(from, kOffset);
  cuda_on_cpu::check_access("load_streaming", from, sizeof(uint4));
  uint4 v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <int kOffset = 0>
inline void store_streaming(void* to, uint4 v) {
  to = behind(to, kOffset);
  cuda_on_cpu::check_access("store_streaming", to, sizeof v);
  memcpy(to, &v, sizeof v);
}

// The bytes arrive no sooner than somebody has waited for them: until then the destination is NaN.
template <int kOffset = 0>
inline void copy_async(void* to_shared, const void* from_global) {
  constexpr size_t kBytes = 16;
  to_shared = behind(to_shared, kOffset), from_global = behind(from_global, kOffset);
  cuda_on_cpu::check_access("copy_async", from_global, kBytes);
  cuda_on_cpu::check_shared("copy_async", to_shared, kBytes, kBytes);
  memset(to_shared, 0xFF, kBytes);
  cuda_on_cpu::Thread& me = *cuda_on_cpu::current;
  me.copies.push_back({to_shared, from_global, me.committed});
}
inline void copy_async_commit() { ++cuda_on_cpu::current->committed; }
template <int kPending>
inline void copy_async_wait() {
  cuda_on_cpu::Thread& me = *cuda_on_cpu::current;
  size_t done = 0;
  for (; done < me.copies.size() && me.copies[done].group + kPending < me.committed; ++done) {
    memcpy(me.copies[done].to, me.copies[done].from, 16);
  }
  me.copies.erase(me.copies.begin(), me.copies.begin() + done);
}

// Subnormal numbers become 0.
inline float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }

// The approximate instructions are as wrong as they may be: off by the whole error bound, less the rounding
// to float, in a direction that depends on the bits of x.
inline float approximate(double exact, float x, double bound) {
  constexpr double kRounding = 0x1p-24;
  const bool upwards = (__float_as_uint(x) * 0x9E3779B1u) >> 31;
  const float y = static_cast<float>(exact * (1 + (upwards ? bound - kRounding : kRounding - bound)));
  return flush(y);
}
inline float exp2_approx(float x) {
  if (flush(x) == 0) return 1;
  return approximate(exp2(static_cast<double>(x)), x, 0x1p-22);
}
inline float reciprocal_approx(float x) { return approximate(1 / static_cast<double>(flush(x)), x, 0x1p-23); }

// Sixteen-bit floats, one at a time.
inline float from_bf16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
inline float from_f16(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) return copysignf(static_cast<float>(fraction) * 0x1p-24f, __uint_as_float(sign));
  return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}
inline uint16_t to_bf16(float x) {
  if (isnan(x)) return 0x7fff;
  const uint32_t bits = __float_as_uint(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t to_f16(float x) {
  if (isnan(x)) return 0x7fff;
  const uint32_t sign = __float_as_uint(x) >> 16 & 0x8000, bits = __float_as_uint(fabsf(x));
  if (fabsf(x) >= 65520) return sign | 0x7c00;
  if (fabsf(x) < 0x1p-14f) return sign | lrintf(fabsf(x) * 0x1p24f);
  return sign | (((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10));
}

inline uint16_t half_of(uint32_t pair, int i) { return static_cast<uint16_t>(pair >> 16 * i); }
inline uint32_t pair_of(uint16_t low, uint16_t high) { return static_cast<uint32_t>(high) << 16 | low; }

// Passes over NaNs; +0 is more than -0.
template <float (*from)(uint16_t)>
inline uint16_t max_16(uint16_t a, uint16_t b) {
  const float x = from(a), y = from(b);
  if (isnan(x) && isnan(y)) return 0x7fff;
  if (isnan(x) || y > x || (x == y && signbit(x))) return b;
  return a;
}
inline uint32_t max_bf16x2(uint32_t a, uint32_t b) {
  return pair_of(max_16<from_bf16>(half_of(a, 0), half_of(b, 0)),
                 max_16<from_bf16>(half_of(a, 1), half_of(b, 1)));
}
inline uint32_t max_f16x2(uint32_t a, uint32_t b) {
  return pair_of(max_16<from_f16>(half_of(a, 0), half_of(b, 0)),
                 max_16<from_f16>(half_of(a, 1), half_of(b, 1)));
}
inline float2 unpack_bf16x2(uint32_t pair) {
  return {from_bf16(half_of(pair, 0)), from_bf16(half_of(pair, 1))};
}
inline float2 unpack_f16x2(uint32_t pair) { return {from_f16(half_of(pair, 0)), from_f16(half_of(pair, 1))}; }
inline uint32_t pack_bf16x2(float first, float second) { return pair_of(to_bf16(first), to_bf16(second)); }
inline uint32_t pack_f16x2(float first, float second) { return pair_of(to_f16(first), to_f16(second)); }

template <int kLanes, typename T>
inline T shuffle_xor(T value, CUDA_ON_CPU_SITE) {
  return __shfl_xor_sync(0xffffffffu, value, kLanes, 32, file, line);
}

inline void cluster_arrive(CUDA_ON_CPU_SITE) {
  if (!cuda_on_cpu::engine->launch.device_has_clusters) return;
  cuda_on_cpu::arrive_at_cluster_barrier({"cluster_arrive", file, line});
}
inline void cluster_wait(CUDA_ON_CPU_SITE) {
  if (!cuda_on_cpu::engine->launch.device_has_clusters) return;
  cuda_on_cpu::wait_at_cluster_barrier({"cluster_wait", file, line});
}
template <typename T>
inline const T* in_cluster(const T* shared, uint32_t rank) {
  cuda_on_cpu::check_shared("in_cluster", shared, sizeof(T), alignof(T));
  if (!cuda_on_cpu::engine->launch.device_has_clusters) return shared;
  if (rank >= cuda_on_cpu::engine->blocks) {
    cuda_on_cpu::fault(cudaErrorIllegalAddress, "in_cluster: no block of rank " + std::to_string(rank));
  }
  const char* own = cuda_on_cpu::current->block->shared;
  return reinterpret_cast<const T*>(cuda_on_cpu::engine->block[rank].shared +
                                    (reinterpret_cast<const char*>(shared) - own));
}

}  // namespace mixce::ptx
