// Kernels with one fault each, and their correct twins, which write out[i] = in[i] for all i, by way of
// another thread where threads meet.
#pragma once

#include <cuda_runtime.h>

#include <ptx.cuh>

namespace ptx = mixce::ptx;

constexpr unsigned kThreads = 64, kBlocks = 8, kAll = 0xffffffff;

__device__ float* shared_floats() { return reinterpret_cast<float*>(ptx::shared_memory()); }
__device__ unsigned global_index() { return blockIdx.x * kThreads + threadIdx.x; }
__device__ unsigned lane_index() { return threadIdx.x % 32; }

// Barriers

template <bool kFaulty>
__global__ void missing_barrier(const float* in, float* out) {
  float* const shared = shared_floats();
  const unsigned next = (threadIdx.x + 1) % kThreads;
  shared[threadIdx.x] = in[global_index()];
  __syncthreads();
  const float neighbour = shared[next];
  if (!kFaulty) __syncthreads();
  shared[threadIdx.x] = neighbour;
  __syncthreads();
  out[global_index()] = shared[(threadIdx.x + kThreads - 1) % kThreads];
}

template <bool kFaulty>
__global__ void unwritten_shared(const float* in, float* out) {
  if (!kFaulty || threadIdx.x != 5) shared_floats()[threadIdx.x] = in[global_index()];
  __syncthreads();
  out[global_index() ^ 1] = shared_floats()[threadIdx.x ^ 1];
}

template <bool kFaulty>
__global__ void early_exit(const float* in, float* out) {
  out[global_index()] = in[global_index()];
  if (kFaulty && threadIdx.x >= 48) return;
  __syncthreads();
}

template <bool kFaulty>
__global__ void barrier_in_branch(const float* in, float* out) {
  out[global_index()] = in[global_index()];
  if (kFaulty && threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

template <bool kFaulty>
__global__ void barrier_for_one_lane(const float* in, float* out) {
  out[global_index()] = in[global_index()];
  if (kFaulty && lane_index() == 0) __syncthreads();
  __syncwarp();
}

// Warps

template <bool kFaulty>
__global__ void lane_not_in_mask(const float* in, float* out) {
  out[global_index() ^ 1] = __shfl_xor_sync(kFaulty ? 0xffff : kAll, in[global_index()], 1);
}

template <bool kFaulty>
__global__ void source_not_in_mask(const float* in, float* out) {
  const unsigned i = global_index();
  if (lane_index() >= 16) {
    out[i] = in[i];
  } else {
    out[i ^ 8] = kFaulty ? __shfl_down_sync(0xffff, in[i ^ 8], 8) : __shfl_xor_sync(0xffff, in[i], 8);
  }
}

template <bool kFaulty>
__global__ void exited_lane(const float* in, float* out) {
  const unsigned i = global_index();
  out[i] = in[i];
  if (lane_index() >= 16) return;
  out[i] = __shfl_xor_sync(kFaulty ? kAll : 0xffff, in[i ^ 1], 1);
}

template <bool kFaulty>
__global__ void mixed_warp_operations(const float* in, float* out) {
  const unsigned i = global_index();
  out[i] = in[i];
  if (lane_index() < 16) {
    __syncwarp(kFaulty ? kAll : 0xffff);
  } else {
    out[i] = __shfl_xor_sync(kFaulty ? kAll : 0xffff0000, in[i ^ 1], 1);
  }
}

// Asynchronous copies

template <bool kFaulty>
__global__ void missing_copy_wait(const float* in, float* out) {
  if (threadIdx.x < kThreads / 4) {
    const unsigned i = threadIdx.x * 4;
    ptx::copy_async(shared_floats() + i, in + blockIdx.x * kThreads + i);
    ptx::copy_async_commit();
    if (!kFaulty) ptx::copy_async_wait<0>();
  }
  __syncthreads();
  out[global_index()] = shared_floats()[threadIdx.x];
}

template <bool kFaulty>
__global__ void short_copy_wait(const float* in, float* out) {
  if (threadIdx.x < kThreads / 8) {
    for (unsigned i : {threadIdx.x * 8, threadIdx.x * 8 + 4}) {
      ptx::copy_async(shared_floats() + i, in + blockIdx.x * kThreads + i);
      ptx::copy_async_commit();
    }
    ptx::copy_async_wait<kFaulty>();
  }
  __syncthreads();
  out[global_index()] = shared_floats()[threadIdx.x];
}

// Clusters of two blocks

template <bool kBarrierBefore, bool kBarrierAfter, unsigned kOther = 1>
__device__ void swap_in_cluster(const float* in, float* out) {
  shared_floats()[threadIdx.x] = in[global_index()];
  if (kBarrierBefore) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  const float value = *ptx::in_cluster(shared_floats() + threadIdx.x, (blockIdx.x & 1) ^ kOther);
  if (kBarrierAfter) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  out[global_index() ^ kThreads] = value;
}
template <bool kFaulty>
__global__ void missing_first_cluster_barrier(const float* in, float* out) {
  swap_in_cluster<!kFaulty, true>(in, out);
}
template <bool kFaulty>
__global__ void missing_last_cluster_barrier(const float* in, float* out) {
  swap_in_cluster<true, !kFaulty>(in, out);
}
template <bool kFaulty>
__global__ void no_such_rank(const float* in, float* out) {
  swap_in_cluster<true, true, kFaulty ? 2 : 1>(in, out);
}
template <bool kFaulty>
__global__ void cluster_wait_alone(const float* in, float* out) {
  swap_in_cluster<true, true>(in, out);
  if (kFaulty) ptx::cluster_wait();
}
template <bool kFaulty>
__global__ void cluster_arrive_twice(const float* in, float* out) {
  swap_in_cluster<true, true>(in, out);
  if (kFaulty) ptx::cluster_arrive();
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// Addresses

template <int kLoadOffset, int kStoreOffset>
__device__ void copy_vectors(const float* in, float* out) {
  if (threadIdx.x >= kThreads / 4) return;
  const unsigned i = blockIdx.x * kThreads + threadIdx.x * 4;
  ptx::store_streaming(out + i + kStoreOffset, ptx::load_streaming(in + i + kLoadOffset));
}
template <bool kFaulty>
__global__ void load_out_of_range(const float* in, float* out) {
  copy_vectors<kFaulty ? -4 : 0, 0>(in, out);
}
template <bool kFaulty>
__global__ void store_out_of_range(const float* in, float* out) {
  copy_vectors<0, kFaulty ? -4 : 0>(in, out);
}
template <bool kFaulty>
__global__ void load_misaligned(const float* in, float* out) {
  copy_vectors<kFaulty, 0>(in, out);
}
template <bool kFaulty>
__global__ void store_misaligned(const float* in, float* out) {
  copy_vectors<0, kFaulty>(in, out);
}

template <bool kFaulty>
__global__ void copy_misaligned(const float* in, float* out) {
  if (kFaulty) ptx::copy_async(shared_floats() + 1, in);
  out[global_index()] = in[global_index()];
}

template <bool kFaulty>
__global__ void dereference_out_of_range(const float* in, float* out) {
  const float value = in[global_index() + kFaulty];
  out[global_index()] = value;
}

template <bool kFaulty>
__global__ void dereference_misaligned(const float* in, float* out) {
  if (threadIdx.x >= kThreads / 4) return;
  const unsigned i = blockIdx.x * kThreads + threadIdx.x * 4;
  *reinterpret_cast<float4*>(out + i) = *reinterpret_cast<const float4*>(in + i + kFaulty);
}

template <bool kFaulty>
__global__ void shared_out_of_range(const float* in, float* out) {
  float* const own = shared_floats() + threadIdx.x + kFaulty;
  *own = in[global_index()];
  out[global_index()] = *own;
}

template <bool kFaulty>
__global__ void array_out_of_bounds(const float* in, float* out) {
  struct Shared {
    float values[kThreads];
  };
  auto& shared = *reinterpret_cast<Shared*>(ptx::shared_memory());  // more memory follows
  shared.values[threadIdx.x + kFaulty] = in[global_index()];
  out[global_index()] = shared.values[threadIdx.x + kFaulty];
}

template <bool kFaulty>
__global__ void stack_overflow(const float* in, float* out) {
  volatile float frame[kFaulty ? 18 << 10 : 1];
  frame[0] = in[global_index()];
  out[global_index()] = frame[0];
}

template <bool kFaulty>
__global__ void trap(const float* in, float* out) {
  if (kFaulty) __builtin_trap();
  out[global_index()] = in[global_index()];
}
