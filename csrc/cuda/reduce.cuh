// Partial row statistics and their merging: in a warp, a block, a cluster. The order of every sum is fixed by
// the launch alone, so the same inputs give the same bits.
#pragma once

#include "vec.cuh"

namespace mixce {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpSize = 32;

// Statistics of a part of a row, in units of (capped) logits, and whether a logit in it beats the target's:
// larger, or equal and earlier.
template <typename Real>
struct Partial {
  OnlineLogSumExp<Real> sums;
  int beaten;
};

// The maximum starts at the lowest finite number, not at -inf: a difference from it is then no NaN, and
// logits of -inf yield exponentials of 0.
template <typename Real>
__device__ __forceinline__ Partial<Real> empty_partial() {
  Partial<Real> part{empty_log_sum_exp<Real>(), 0};
  part.sums.m = sizeof(Real) == sizeof(float) ? -FLT_MAX : -DBL_MAX;
  return part;
}

// Adds another part of the same maximum. kMoments: also what label smoothing and statistics need.
template <bool kMoments, typename Real>
__device__ __forceinline__ void add_partial(Partial<Real>& part, const Partial<Real>& other) {
  part.sums.sum_exp += other.sums.sum_exp;
  if constexpr (kMoments) {
    part.sums.sum_shifted += other.sums.sum_shifted;
    part.sums.sum_exp_shifted += other.sums.sum_exp_shifted;
    part.sums.count += other.sums.count;
    part.beaten |= other.beaten;
  }
}

// Merges the parts of a warp's lanes; every lane gets the whole. First the maxima meet, so that each lane
// spends one exponential however many parts there are.
template <bool kMoments, typename Real>
__device__ __forceinline__ void merge_warp(Partial<Real>& part, const Exponential<Real>& exponential) {
  Real maximum = part.sums.m;
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    maximum = fmax(maximum, __shfl_xor_sync(kAllLanes, maximum, distance));
  }
  raise_maximum(part.sums, maximum, exponential);
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    Partial<Real> other;
    other.sums.sum_exp = __shfl_xor_sync(kAllLanes, part.sums.sum_exp, distance);
    if constexpr (kMoments) {
      other.sums.sum_shifted = __shfl_xor_sync(kAllLanes, part.sums.sum_shifted, distance);
      other.sums.sum_exp_shifted = __shfl_xor_sync(kAllLanes, part.sums.sum_exp_shifted, distance);
      other.sums.count = __shfl_xor_sync(kAllLanes, part.sums.count, distance);
      other.beaten = __shfl_xor_sync(kAllLanes, part.beaten, distance);
    }
    add_partial<kMoments>(part, other);
  }
}

// Merges any number of parts in memory by one warp; every lane gets the whole.
template <bool kMoments, typename Real, typename PartAt>
__device__ __forceinline__ Partial<Real> merge_parts(int count, PartAt part_at,
                                                     const Exponential<Real>& exponential) {
  Partial<Real> merged = empty_partial<Real>();
  for (int i = threadIdx.x % kWarpSize; i < count; i += kWarpSize) {
    Partial<Real> part = part_at(i);
    raise_maximum(merged.sums, part.sums.m, exponential);
    raise_maximum(part.sums, merged.sums.m, exponential);
    add_partial<kMoments>(merged, part);
  }
  merge_warp<kMoments>(merged, exponential);
  return merged;
}

}  // namespace mixce
