// Stands in for CUDA's <cuda_runtime.h>: kernels and launchers compiled by g++, and run on CPU memory.
//
// CUDA_ON_CPU_ORDER    forward (default), reverse, shuffled:SEED: which thread runs first where several could
// CUDA_ON_CPU_DEVICE   sm_80, sm_90 (default), sm_100, sm_120: the device to pretend
#pragma once

#include <math.h>
#include <string.h>

#include "runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
// Nothing could guard or poison a variable that the compiler places.
#define __shared__ _Pragma("GCC error \"take shared memory from mixce::ptx::shared_memory()\"")

// Kernels

constexpr int warpSize = 32;

#define CUDA_ON_CPU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_ON_CPU_SITE) {
  cuda_on_cpu::block_barrier({"__syncthreads", file, line}, false);
}
inline int __syncthreads_count(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_barrier({"__syncthreads_count", file, line}, predicate != 0);
}
inline int __syncthreads_or(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_barrier({"__syncthreads_or", file, line}, predicate != 0) != 0;
}
inline int __syncthreads_and(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_barrier({"__syncthreads_and", file, line}, predicate == 0) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffff, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::meet_warp({"__syncwarp", file, line}, mask, 0, cuda_on_cpu::current->lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::meet_warp({"__ballot_sync", file, line}, mask, predicate != 0,
                                cuda_on_cpu::current->lane)
      .votes;
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::meet_warp({"__any_sync", file, line}, mask, predicate != 0, cuda_on_cpu::current->lane)
             .votes != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::meet_warp({"__all_sync", file, line}, mask, predicate == 0, cuda_on_cpu::current->lane)
             .votes == 0;
}

namespace cuda_on_cpu {
template <typename T>
inline T shuffle(const Site& site, unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 32 or 64 bits");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = meet_warp(site, mask, bits, source).value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
}  // namespace cuda_on_cpu

// Lanes shuffle within segments of `width`; a lane whose source lies outside keeps its own value.
template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_CPU_SITE) {
  const unsigned first = cuda_on_cpu::current->lane & -width;
  return cuda_on_cpu::shuffle({"__shfl_sync", file, line}, mask, value, first + (source & (width - 1)));
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, CUDA_ON_CPU_SITE) {
  const unsigned lane = cuda_on_cpu::current->lane, source = lane ^ lane_mask, last = lane | (width - 1);
  return cuda_on_cpu::shuffle({"__shfl_xor_sync", file, line}, mask, value, source <= last ? source : lane);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  const unsigned lane = cuda_on_cpu::current->lane, last = lane | (width - 1);
  return cuda_on_cpu::shuffle({"__shfl_down_sync", file, line}, mask, value,
                              lane + delta <= last ? lane + delta : lane);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  const unsigned lane = cuda_on_cpu::current->lane, in_segment = lane & (width - 1);
  return cuda_on_cpu::shuffle({"__shfl_up_sync", file, line}, mask, value,
                              delta <= in_segment ? lane - delta : lane);
}

inline void __threadfence() {}
template <typename T>
inline T __ldg(const T* address) {
  return *address;
}
inline int atomicAdd(int* address, int value) { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

namespace cuda_on_cpu {
template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace cuda_on_cpu

inline unsigned __float_as_uint(float x) { return cuda_on_cpu::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return cuda_on_cpu::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::bit_cast<float>(x); }
inline float __int_as_float(int x) { return cuda_on_cpu::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return cuda_on_cpu::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return cuda_on_cpu::bit_cast<double>(x); }
inline int __double2hiint(double x) { return static_cast<int>(__double_as_longlong(x) >> 32); }
inline int __double2loint(double x) { return static_cast<int>(__double_as_longlong(x)); }
inline double __hiloint2double(int high, int low) {
  return __longlong_as_double(static_cast<long long>(high) << 32 | static_cast<unsigned>(low));
}

inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  }
  return result;
}

#define CUDA_ON_CPU_MIN_MAX(T)                     \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
CUDA_ON_CPU_MIN_MAX(int)
CUDA_ON_CPU_MIN_MAX(unsigned)
CUDA_ON_CPU_MIN_MAX(long)
CUDA_ON_CPU_MIN_MAX(unsigned long)
CUDA_ON_CPU_MIN_MAX(long long)
CUDA_ON_CPU_MIN_MAX(unsigned long long)
#undef CUDA_ON_CPU_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
