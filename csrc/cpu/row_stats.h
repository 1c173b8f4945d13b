// Pass 1 over a row of logits: its statistics. A block is read from memory once, for its maximum, and then
// from L1 for its exponentials.
#pragma once

#include "blocks.h"

namespace mixce {
namespace {

// The first `lanes` lanes, added in float64.
template <typename V>
MIXCE_INLINE double lane_sum(typename V::Reg reg, int64_t lanes) {
  typename V::Real values[V::kWidth];
  V::store(values, reg);
  double sum = 0;
  for (int64_t k = 0; k < lanes; ++k) sum += values[k];
  return sum;
}

// The largest of a block, -inf if none is larger. NaNs may be passed over or returned: the sums will meet
// them.
template <typename V, typename T>
MIXCE_BLOCK typename V::Real block_maximum(const T* x, int64_t size) {
  using Real = typename V::Real;
  Real largest = -static_cast<Real>(INFINITY);
  typename V::Reg largest_a = V::set(largest), largest_b = largest_a;
  int64_t i = 0;
  for (; i + 2 * V::kWidth <= size; i += 2 * V::kWidth) {
    typename V::Reg a, b;
    V::load_pair(x + i, &a, &b);
    largest_a = V::max(a, largest_a);  // the second operand survives a NaN
    largest_b = V::max(b, largest_b);
  }
  Real lanes[V::kWidth];
  V::store(lanes, V::max(largest_a, largest_b));
  for (int k = 0; k < V::kWidth; ++k) largest = lanes[k] > largest ? lanes[k] : largest;
  for (; i < size; ++i) largest = to_real(x[i]) > largest ? to_real(x[i]) : largest;
  return largest;
}

// The same for sixteen-bit floats, by their bits, without a conversion: as signed integers the non-negative
// ones come in order and above the negative ones; where there are only negative ones, the largest is the
// smallest as unsigned.
template <typename V, typename T>
MIXCE_BLOCK float block_maximum_16(const T* x, int64_t size) {
  constexpr int kStep = 2 * V::kWidth16;
  uint16_t lanes[kStep];
  for (auto& lane : lanes) lane = 0x8000u;
  typename V::Bits16 found_a = V::load_bits16(lanes), found_b = found_a;
  int64_t i = 0;
  for (; i + kStep <= size; i += kStep) {
    found_a = V::max_signed(V::load_bits16(x + i), found_a);
    found_b = V::max_signed(V::load_bits16(x + i + V::kWidth16), found_b);
  }
  V::store_bits16(lanes, V::max_signed(found_a, found_b));
  int16_t largest = INT16_MIN;
  for (int k = 0; k < V::kWidth16; ++k) {
    if (static_cast<int16_t>(lanes[k]) > largest) largest = static_cast<int16_t>(lanes[k]);
  }
  for (; i < size; ++i) {
    if (static_cast<int16_t>(x[i].bits) > largest) largest = static_cast<int16_t>(x[i].bits);
  }
  if (largest >= 0) return to_real(T{static_cast<uint16_t>(largest)});

  for (auto& lane : lanes) lane = 0xffffu;
  found_a = found_b = V::load_bits16(lanes);
  for (i = 0; i + kStep <= size; i += kStep) {
    found_a = V::min_unsigned(V::load_bits16(x + i), found_a);
    found_b = V::min_unsigned(V::load_bits16(x + i + V::kWidth16), found_b);
  }
  V::store_bits16(lanes, V::min_unsigned(found_a, found_b));
  uint16_t smallest = 0xffffu;
  for (int k = 0; k < V::kWidth16; ++k) smallest = lanes[k] < smallest ? lanes[k] : smallest;
  for (; i < size; ++i) smallest = x[i].bits < smallest ? x[i].bits : smallest;
  return to_real(T{smallest});
}

template <typename V>
MIXCE_INLINE float block_maximum(const BFloat16* x, int64_t size) {
  return block_maximum_16<V>(x, size);
}
template <typename V>
MIXCE_INLINE float block_maximum(const Half* x, int64_t size) {
  return block_maximum_16<V>(x, size);
}

// Elements whose sums stay in lanes of float32, 32 additions to a lane: one that holds the exponential of a
// confident target loses digits of all that is added to it.
template <typename V>
constexpr int64_t kSumBlock = 32 * 2 * V::kWidth < kBlock ? 32 * 2 * V::kWidth : kBlock;

template <typename V>
struct BlockSums {
  typename V::Reg exp, shifted, exp_shifted;
};

// The exponentials of some logits relative to the finite reference `m`, and for label smoothing and entropy
// (kMoments) the shifted logits and their products.
template <typename V, bool kCap, bool kMoments>
MIXCE_INLINE BlockSums<V> sums_of(typename V::Reg logits, typename V::Reg m,
                                  const Transform<typename V::Real>& transform,
                                  const Exponential<V>& exponential) {
  if constexpr (kCap) logits = capped(logits, transform.softcap).value;
  const typename V::Reg d = V::sub(logits, m);
  const typename V::Reg e = exponential.of(d);
  // The clamp keeps 0 * -inf out; the second operand survives a NaN.
  return {e, d, kMoments ? V::mul(e, V::max(V::set(static_cast<typename V::Real>(-1e30)), d)) : e};
}

// Adds the first `lanes` lanes.
template <typename V, bool kMoments>
MIXCE_INLINE void add_lanes(const BlockSums<V>& sums, int64_t lanes, double scale,
                            OnlineLogSumExp<double>& part) {
  part.sum_exp += lane_sum<V>(sums.exp, lanes);
  if constexpr (kMoments) {
    part.sum_shifted += scale * lane_sum<V>(sums.shifted, lanes);
    part.sum_exp_shifted += scale * lane_sum<V>(sums.exp_shifted, lanes);
  }
}

// Pass 1 over the end of a row, fewer elements than a pair.
template <typename V, typename T, bool kCap, bool kMoments, bool kKeep>
MIXCE_BLOCK void add_end(const T* x, int64_t size, typename V::Real m,
                         const Transform<typename V::Real>& transform, const Exponential<V>& exponential,
                         typename V::Real* kept, OnlineLogSumExp<double>& part) {
  for (int64_t i = 0; i < size; i += V::kWidth) {
    const int64_t n = size - i < V::kWidth ? size - i : V::kWidth;
    const auto sums = sums_of<V, kCap, kMoments>(load_edge<V>(x + i, n), V::set(m), transform, exponential);
    add_lanes<V, kMoments>(sums, n, transform.scale, part);
    if constexpr (kKeep) store_edge<V>(kept + i, sums.exp, n);
  }
}

// Pass 1 over one block, relative to the finite reference `m`. With kKeep the exponentials stay in `kept`.
template <typename V, typename T, bool kCap, bool kMoments, bool kKeep>
MIXCE_BLOCK void add_block(const T* x, int64_t size, typename V::Real m,
                           const Transform<typename V::Real>& transform, const Exponential<V>& exponential,
                           typename V::Real* kept, OnlineLogSumExp<double>& part) {
  using Reg = typename V::Reg;
  const Reg reference = V::set(m);
  // Apart, not in a struct, which would stay in memory.
  Reg exp_sum = V::set(0), shifted_sum = exp_sum, exp_shifted_sum = exp_sum;
  int64_t i = 0;
#pragma GCC unroll 2
  for (; i + 2 * V::kWidth <= size; i += 2 * V::kWidth) {
    Reg a, b;
    V::load_pair(x + i, &a, &b);
    V::prefetch(x + i + kBlock);
    const auto sums_a = sums_of<V, kCap, kMoments>(a, reference, transform, exponential);
    const auto sums_b = sums_of<V, kCap, kMoments>(b, reference, transform, exponential);
    // The pair first: one chain of additions, in one register, is short enough.
    exp_sum = V::add(exp_sum, V::add(sums_a.exp, sums_b.exp));
    if constexpr (kMoments) {
      shifted_sum = V::add(shifted_sum, V::add(sums_a.shifted, sums_b.shifted));
      exp_shifted_sum = V::add(exp_shifted_sum, V::add(sums_a.exp_shifted, sums_b.exp_shifted));
    }
    if constexpr (kKeep) V::store_pair(kept + i, sums_a.exp, sums_b.exp);
  }
  add_lanes<V, kMoments>({exp_sum, shifted_sum, exp_shifted_sum}, V::kWidth, transform.scale, part);
  if (i < size) {
    add_end<V, T, kCap, kMoments, kKeep>(x + i, size - i, m, transform, exponential, kept + i, part);
  }
  part.count += size;
}

template <typename Real>
struct RowStats {
  OnlineLogSumExp<double> sums;
  Real m;            // largest (capped) logit, before scale_of_differences
  Real raw_maximum;  // largest logit
};

// Pass 1: one read of the row, in an order that no address changes, so that the sums are the same on every
// run. With kKeep the exponentials of the row stay in kept[0, V), each block's relative to the maximum that
// was known then, which stands behind them.
template <typename V, typename T, bool kCap, bool kMoments, bool kKeep>
MIXCE_INLINE RowStats<typename V::Real> row_stats(const T* x, int64_t vocab_size,
                                                  const Transform<typename V::Real>& transform,
                                                  const Exponential<V>& exponential, typename V::Real* kept) {
  using Real = typename V::Real;
  const Real lowest = -static_cast<Real>(INFINITY);
  RowStats<Real> stats{empty_log_sum_exp<double>(), lowest, lowest};
  walk_row(vocab_size, [&](int64_t begin, int64_t size) __attribute__((always_inline)) {
    const Real maximum = block_maximum<V>(x + begin, size);
    if (maximum > stats.raw_maximum || begin == 0) {
      stats.raw_maximum = maximum;
      stats.m = capped_scalar<V, T, kCap>(maximum, transform.softcap);
      raise_maximum(stats.sums, static_cast<double>(transform.scale) * stats.m,
                    [](double d) { return exp(d); });
    }
    if constexpr (kKeep) kept[vocab_size + begin / kBlock] = stats.m;
    // Before the first finite logit any finite reference will do.
    const Real reference = stats.m == lowest ? 0 : stats.m;
    for (int64_t i = begin; i < begin + size; i += kSumBlock<V>) {
      const int64_t rest = begin + size - i;
      add_block<V, T, kCap, kMoments, kKeep>(x + i, rest < kSumBlock<V> ? rest : kSumBlock<V>, reference,
                                             transform, exponential, kept + i, stats.sums);
    }
  });
  return stats;
}

}  // namespace
}  // namespace mixce
