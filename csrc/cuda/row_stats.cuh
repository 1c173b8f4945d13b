// Pass 1 over a row, or over a part of it: its statistics, from global memory or on the way to shared memory.
#pragma once

#include "reduce.cuh"

namespace mixce {

// 256 threads: a multiprocessor holds five such blocks of a plain pass or three of another, so that one's
// reduction hides behind the others' loads, and a row of 32,000 logits still leaves a thread more of them
// than its share of the reduction costs.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
// Vectors of a thread under way at once. Four are 16 KiB a block: two blocks cover the latency of an H100 (25
// B/ns a multiprocessor for 700 ns). They also share one exponential for the running maximum: 1/32 a
// bfloat16. Two of float64, whose exponentials need the registers.
template <typename T>
constexpr int kUnroll = sizeof(T) == sizeof(double) ? 2 : 4;
// Groups of vectors that are copied to shared memory ahead of the one in use.
constexpr int kGroupsAhead = 3;

// The vectors [first, last) of a row's body that this block takes, and whether it takes the edges too.
struct Share {
  int first, last;
  bool edges;
};
__device__ __forceinline__ Share share_of(int count, int part, int parts) {
  const int each = static_cast<unsigned>(count + parts - 1) / static_cast<unsigned>(parts);
  const int first = min(part * each, count);
  return {first, min(first + each, count), part == 0};
}

// The running statistics of one thread.
template <typename T, bool kCap, bool kMoments>
struct Accumulator {
  using F = Format<T>;
  using Real = typename F::Real;

  const Exponential<Real> exponential;
  const Softcap<Real> softcap;
  const Real x_target;
  const int target;  // its column
  Partial<Real> part = empty_partial<Real>();

  __device__ __forceinline__ Accumulator(const RowParams& params, double scale, Real x_target, int target)
      : exponential(scale), softcap(softcap_of<Real>(params.options)), x_target(x_target), target(target) {}

  // Some vectors, the first of which begins at column `column`, the next ones kThreads vectors apart.
  template <int kVectors>
  __device__ __forceinline__ void add(const uint4 (&vectors)[kVectors], int column) {
    raise_to(maximum_of<T>(vectors), [&] {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        Real x[F::kWidth];
        F::unpack(vectors[i], x);
#pragma unroll
        for (int k = 0; k < F::kWidth; ++k) compare(x[k], column + i * kThreads * F::kWidth + k);
      }
    });
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      Real x[F::kWidth];
      F::unpack(vectors[i], x);
      add_values(x);
    }
  }

  // One logit.
  __device__ __forceinline__ void add(T logit, int column) {
    const Real x[1] = {F::to_real(logit)};
    raise_to(x[0], [&] { compare(x[0], column); });
    add_values(x);
  }

 private:
  template <typename Compare>
  __device__ __forceinline__ void raise_to(Real maximum, Compare compare_each) {
    if constexpr (kMoments) {
      if (!part.beaten && maximum >= x_target) compare_each();
    }
    if constexpr (kCap) maximum = capped(maximum, softcap).value;
    raise_maximum(part.sums, maximum, exponential);
  }

  __device__ __forceinline__ void compare(Real x, int column) {
    part.beaten |= x > x_target || (x == x_target && column < target);
  }

  // Sums of a vector first: the running sum takes a step a vector, not a step a logit. Products are added up
  // as they are made, in two sums.
  template <int kCount>
  __device__ __forceinline__ void add_values(const Real (&x)[kCount]) {
    constexpr int kSums = kCount > 1 ? 2 : 1;
    Real e[kCount], d[kCount], products[kSums], squares[kSums];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const Real z = kCap ? capped(x[k], softcap).value : x[k];
      d[k] = z - part.sums.m;
      e[k] = exponential(d[k]);
      if constexpr (kMoments) {
        // The clamp keeps 0 * -inf out; e still brings a NaN.
        const Real finite = fmax(d[k], static_cast<Real>(-1e30));
        const int sum = k % kSums;
        products[sum] = k < kSums ? e[k] * finite : fma(e[k], finite, products[sum]);
        squares[sum] = k < kSums ? e[k] * e[k] : fma(e[k], e[k], squares[sum]);
      }
    }
    part.sums.sum_exp += tree_sum(e);
    if constexpr (kMoments) {
      part.sums.sum_shifted += tree_sum(d);
      part.sums.sum_exp_shifted += tree_sum(products);
      part.sums.sum_exp_squared += tree_sum(squares);
      part.sums.count += kCount;
    }
  }

  template <int kCount>
  static __device__ __forceinline__ Real tree_sum(Real (&values)[kCount]) {
#pragma unroll
    for (int half = kCount / 2; half > 0; half /= 2) {
#pragma unroll
      for (int k = 0; k < half; ++k) values[k] += values[k + half];
    }
    return values[0];
  }
};

// This thread's vectors of a share: every kThreads-th from the first on, so many groups of kGroup and a rest.
struct Walk {
  int first, groups, rest;
};
constexpr int kVectorStep = kThreads * sizeof(uint4);  // bytes from a thread's vector to its next
template <int kGroup>
__device__ __forceinline__ Walk walk_of(const Share& share) {
  const int first = share.first + threadIdx.x;
  const unsigned vectors = static_cast<unsigned>(max(share.last - first + kThreads - 1, 0)) / kThreads;
  return {first, static_cast<int>(vectors / kGroup), static_cast<int>(vectors % kGroup)};
}

// Calls add(vectors, i) for this thread's groups of vectors, i the index of a group's first vector, with the
// vectors from global memory.
template <int kGroup, typename Add>
__device__ __forceinline__ void walk_global(const uint4* vectors, const Share& share, Add add) {
  Walk walk = walk_of<kGroup>(share);
  const uint4* from = vectors + walk.first;
  for (; walk.groups > 0; --walk.groups) {
    uint4 group[kGroup];
    unroll<kGroup>([&](auto j) { group[j.value] = ptx::load_streaming<j.value * kVectorStep>(from); });
    add(group, walk.first);
    walk.first += kGroup * kThreads, from += kGroup * kThreads;
  }
  for (; walk.rest > 0; --walk.rest) {
    const uint4 group[1] = {ptx::load_streaming(from)};
    add(group, walk.first);
    walk.first += kThreads, from += kThreads;
  }
}

// The same by way of `held`, shared memory for the whole share, where the vectors stay. A thread reads only
// what it copied itself, so no barrier is needed.
template <int kGroup, typename Add>
__device__ __forceinline__ void walk_and_hold(const uint4* vectors, const Share& share, uint4* held,
                                              Add add) {
  Walk walk = walk_of<kGroup>(share);
  const uint4* from = vectors + walk.first;
  uint4* to = held + threadIdx.x;
  const uint4* arrived = to;
  int groups_to_copy = walk.groups;
  // The rest goes with the group that would follow the last.
  auto copy_group = [&] {
    if (groups_to_copy > 0) {
      unroll<kGroup>([&](auto j) { ptx::copy_async<j.value * kVectorStep>(to, from); });
      from += kGroup * kThreads, to += kGroup * kThreads;
    } else if (groups_to_copy == 0) {
      for (int i = 0; i < walk.rest; ++i) ptx::copy_async(to + i * kThreads, from + i * kThreads);
    }
    --groups_to_copy;
    ptx::copy_async_commit();
  };
  unroll<kGroupsAhead>([&](auto) { copy_group(); });
  for (; walk.groups > 0; --walk.groups) {
    copy_group();
    ptx::copy_async_wait<kGroupsAhead>();
    uint4 group[kGroup];
    unroll<kGroup>([&](auto j) { group[j.value] = arrived[j.value * kThreads]; });
    add(group, walk.first);
    walk.first += kGroup * kThreads, arrived += kGroup * kThreads;
  }
  ptx::copy_async_wait<0>();
  for (; walk.rest > 0; --walk.rest) {
    const uint4 group[1] = {*arrived};
    add(group, walk.first);
    walk.first += kThreads, arrived += kThreads;
  }
}

}  // namespace mixce
