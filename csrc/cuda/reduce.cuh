// Partial row statistics and their merging: in a warp, a block, a cluster. The order of every sum is fixed by
// the launch alone, so the same inputs give the same bits.
#pragma once

#include "vec.cuh"

namespace mixce {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kLogWarpSize = 5;
constexpr int kWarpSize = 1 << kLogWarpSize;

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
    part.sums.sum_exp_squared += other.sums.sum_exp_squared;
    part.sums.count += other.sums.count;
    part.beaten |= other.beaten;
  }
}

// Leaves a part where others will find it; what kMoments does not need is not kept alive for it.
template <bool kMoments, typename Real>
__device__ __forceinline__ void leave_partial(Partial<Real>& place, const Partial<Real>& part) {
  place.sums.m = part.sums.m;
  place.sums.sum_exp = part.sums.sum_exp;
  if constexpr (kMoments) place = part;
}
template <bool kMoments, typename Real>
__device__ __forceinline__ Partial<Real> find_partial(const Partial<Real>& place) {
  if constexpr (kMoments) return place;
  Partial<Real> part = empty_partial<Real>();
  part.sums.m = place.sums.m;
  part.sums.sum_exp = place.sums.sum_exp;
  return part;
}

// Merges the parts of a warp's lanes; every lane gets the whole. First the maxima meet, so that each lane
// spends one exponential however many parts there are.
template <bool kMoments, typename Real>
__device__ __forceinline__ void merge_warp(Partial<Real>& part, const Exponential<Real>& exponential) {
  Real maximum = part.sums.m;
  unroll<kLogWarpSize>([&](auto bit) { maximum = fmax(maximum, ptx::shuffle_xor<1 << bit.value>(maximum)); });
  raise_maximum(part.sums, maximum, exponential);
  unroll<kLogWarpSize>([&](auto bit) {
    constexpr int kLanes = 1 << bit.value;
    Partial<Real> other;
    other.sums.sum_exp = ptx::shuffle_xor<kLanes>(part.sums.sum_exp);
    if constexpr (kMoments) {
      other.sums.sum_shifted = ptx::shuffle_xor<kLanes>(part.sums.sum_shifted);
      other.sums.sum_exp_shifted = ptx::shuffle_xor<kLanes>(part.sums.sum_exp_shifted);
      other.sums.sum_exp_squared = ptx::shuffle_xor<kLanes>(part.sums.sum_exp_squared);
      other.sums.count = ptx::shuffle_xor<kLanes>(part.sums.count);
      other.beaten = ptx::shuffle_xor<kLanes>(part.beaten);
    }
    add_partial<kMoments>(part, other);
  });
}

// Merges any number of parts in memory by one warp; every lane gets the whole.
template <bool kMoments, typename Real, typename PartAt>
__device__ __forceinline__ Partial<Real> merge_parts(int count, PartAt part_at,
                                                     const Exponential<Real>& exponential) {
  Partial<Real> merged = empty_partial<Real>();
#pragma unroll 1
  for (int i = threadIdx.x % kWarpSize; i < count; i += kWarpSize) {
    Partial<Real> part = find_partial<kMoments>(part_at(i));
    raise_maximum(merged.sums, part.sums.m, exponential);
    raise_maximum(part.sums, merged.sums.m, exponential);
    add_partial<kMoments>(merged, part);
  }
  merge_warp<kMoments>(merged, exponential);
  return merged;
}

}  // namespace mixce
