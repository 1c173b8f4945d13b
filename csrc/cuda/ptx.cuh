// The instructions that CUDA C++ has no name for, one function each, and shared memory, declared one way.
// tests/backends/cuda_on_cpu/ptx.cuh gives the same functions their meaning on a CPU.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace mixce::ptx {

// The block's dynamic shared memory, aligned to 16 bytes; there is no other.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char mixce_shared_memory[];
  return mixce_shared_memory;
}

// A kernel's parameters, read where the kernel begins. Left to itself the compiler reads some of them later,
// through an address of the parameter space in a register.
template <typename Params>
__device__ __forceinline__ Params read_at_entry(const Params& params) {
  constexpr int kWords = sizeof(Params) / sizeof(uint64_t);
  static_assert(sizeof(Params) % sizeof(uint64_t) == 0, "parameters are read in words of 8 bytes");
  uint64_t words[kWords];
  memcpy(words, &params, sizeof(Params));
#pragma unroll
  for (int i = 0; i < kWords; ++i) asm("" : "+l"(words[i]));
  Params copy;
  memcpy(&copy, words, sizeof(Params));
  return copy;
}

// 16 aligned bytes of global memory that no thread will want from L1 again, kOffset bytes behind `from`.
template <int kOffset = 0>
__device__ __forceinline__ uint4 load_streaming(const void* from) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from), "n"(kOffset)
               : "memory");
  return v;
}

// 16 aligned bytes to global memory, first to leave the caches, kOffset bytes behind `to`.
template <int kOffset = 0>
__device__ __forceinline__ void store_streaming(void* to, uint4 v) {
  asm volatile("st.global.cs.v4.u32 [%0 + %1], {%2, %3, %4, %5};"
               :
               : "l"(to), "n"(kOffset), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// 16 aligned bytes from global to shared memory behind the thread's back, past L1 and the registers, kOffset
// bytes behind both addresses.
template <int kOffset = 0>
__device__ __forceinline__ void copy_async(void* to_shared, const void* from_global) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %2], 16;"
               :
               : "r"(to), "l"(from_global), "n"(kOffset)
               : "memory");
}
// Closes the thread's current group of such copies, and waits until at most kPending groups are under way.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

// 2^x: relative error 2^-22, subnormal results are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x: relative error 2^-23.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Pairs of sixteen-bit floats in a word, the first one in the low half. The maximum passes over NaNs.
__device__ __forceinline__ uint32_t max_bf16x2(uint32_t a, uint32_t b) {
  uint32_t c;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
__device__ __forceinline__ uint32_t max_f16x2(uint32_t a, uint32_t b) {
  uint32_t c;
  asm("max.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
// As instructions, because the compiler would move each result from an integer's register to a float's.
__device__ __forceinline__ float2 unpack_bf16x2(uint32_t pair) {
  float2 v;
  asm("shl.b32 %0, %1, 16;" : "=f"(v.x) : "r"(pair));
  asm("and.b32 %0, %1, 0xffff0000;" : "=f"(v.y) : "r"(pair));
  return v;
}
__device__ __forceinline__ float2 unpack_f16x2(uint32_t pair) {
  float2 v;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(v.x), "=f"(v.y)
      : "r"(pair));
  return v;
}
// Rounded to nearest, ties to even.
__device__ __forceinline__ uint32_t pack_bf16x2(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
__device__ __forceinline__ uint32_t pack_f16x2(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// The value of the lane whose number differs in the bits of kLanes; all lanes of the warp take part.
template <int kLanes>
__device__ __forceinline__ float shuffle_xor(float value) {
  float other;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, 0xffffffff;" : "=f"(other) : "f"(value), "n"(kLanes));
  return other;
}
template <int kLanes, typename T>
__device__ __forceinline__ T shuffle_xor(T value) {
  return __shfl_xor_sync(0xffffffffu, value, kLanes);
}

// Thread-block clusters, from sm_90 on; before that a block is a cluster of its own.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive;" : : : "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait;" : : : "memory");
#endif
}
// Where `shared`, an address of the own block's shared memory, lies in the block with that rank.
template <typename T>
__device__ __forceinline__ const T* in_cluster(const T* shared, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<uint64_t>(shared)), "r"(rank));
  return reinterpret_cast<const T*>(address);
#else
  return shared;
#endif
}

}  // namespace mixce::ptx
