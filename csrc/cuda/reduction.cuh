// The kernel of a loss's reduction: one block, since what it reads is a vocabulary's fraction of the logits.
#pragma once

#include "../reduction.h"
#include "reduce.cuh"

namespace mixce {

// With twice as many a thread would have no registers for the tokens that it has under way.
constexpr int kReductionWarps = 16;
constexpr int kReductionThreads = kReductionWarps * kWarpSize;
constexpr int kReductionSharedBytes = kReductionWarps * sizeof(Totals);

// The totals of all threads, in an order that the number of tokens alone decides; every thread gets them.
__device__ __forceinline__ Totals totals_of_block(Totals totals) {
  Totals* const warps = reinterpret_cast<Totals*>(ptx::shared_memory());
  auto add_lanes = [&] {
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      totals.loss += __shfl_xor_sync(kAllLanes, totals.loss, offset);
      totals.weight += __shfl_xor_sync(kAllLanes, totals.weight, offset);
    }
  };
  add_lanes();
  if (threadIdx.x % kWarpSize == 0) warps[threadIdx.x / kWarpSize] = totals;
  __syncthreads();
  const int lane = threadIdx.x % kWarpSize;
  totals = lane < kReductionWarps ? warps[lane] : Totals{};
  add_lanes();
  return totals;
}

// One block a multiprocessor: asked for nothing, the compiler spills to fit more.
template <typename Real>
__global__ void __launch_bounds__(kReductionThreads, 1) reduction_kernel(const ReductionParams r) {
  Totals totals = {};
#pragma unroll 4
  for (int64_t token = threadIdx.x; token < r.number; token += kReductionThreads) {
    add_token<Real>(r, token, totals);
  }
  totals = totals_of_block(totals);
  const double divisor = divisor_of(r, totals);
  if (threadIdx.x == 0) store_total<Real>(r, totals, divisor);
  if (!stores_tokens(r)) return;
#pragma unroll 4
  for (int64_t token = threadIdx.x; token < r.number; token += kReductionThreads) {
    store_token<Real>(r, token, divisor);
  }
}

}  // namespace mixce
