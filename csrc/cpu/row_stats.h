// Pass 1 over a row of logits: its statistics. A block is read from memory once, for its maximum, while the
// exponentials of the block before it are computed, and then from L1 for its own.
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

// The largest of pairs of vectors. NaNs may be passed over or returned: the sums will meet them.
template <typename V, typename T>
struct PairMaximum {
  typename V::Reg a, b;

  PairMaximum() : a(V::set(-static_cast<typename V::Real>(INFINITY))), b(a) {}
  void add(const T* x) {
    typename V::Reg first, second;
    V::load_pair(x, &first, &second);
    a = V::max(first, a);  // the second operand survives a NaN
    b = V::max(second, b);
  }
  // The largest of a block whose pairs before `rest` were added.
  typename V::Real of_block(const T* x, int64_t rest, int64_t size) const {
    typename V::Real lanes[V::kWidth];
    V::store(lanes, V::max(a, b));
    typename V::Real largest = lanes[0];
    for (int k = 1; k < V::kWidth; ++k) largest = lanes[k] > largest ? lanes[k] : largest;
    for (int64_t i = rest; i < size; ++i) largest = to_real(x[i]) > largest ? to_real(x[i]) : largest;
    return largest;
  }
};

// The same for sixteen-bit floats, by their bits, without a conversion: as signed integers the non-negative
// ones come in order and above the negative ones; where there are only negative ones, the largest is the
// smallest as unsigned, which a second look at the block finds.
template <typename V, typename T>
struct PairMaximum16 {
  static constexpr int kVectors = 2 * V::kWidth / V::kWidth16;
  typename V::Bits16 found;

  PairMaximum16() : found(V::set_bits16(INT16_MIN)) {}
  void add(const T* x) {
    for (int k = 0; k < kVectors; ++k) {
      found = V::max_signed(V::load_bits16(x + k * V::kWidth16), found);
    }
  }
  float of_block(const T* x, int64_t rest, int64_t size) const {
    int16_t lanes[V::kWidth16];
    V::store_bits16(lanes, found);
    int16_t largest = lanes[0];
    for (int16_t lane : lanes) largest = lane > largest ? lane : largest;
    for (int64_t i = rest; i < size; ++i) {
      const auto bits = static_cast<int16_t>(x[i].bits);
      largest = bits > largest ? bits : largest;
    }
    return to_real(T{largest >= 0 ? static_cast<uint16_t>(largest) : smallest_unsigned(x, size)});
  }

 private:
  static uint16_t smallest_unsigned(const T* x, int64_t size) {
    typename V::Bits16 found = V::set_bits16(-1);
    int64_t i = 0;
    for (; i + V::kWidth16 <= size; i += V::kWidth16) found = V::min_unsigned(V::load_bits16(x + i), found);
    uint16_t lanes[V::kWidth16];
    V::store_bits16(lanes, found);
    uint16_t smallest = lanes[0];
    for (uint16_t lane : lanes) smallest = lane < smallest ? lane : smallest;
    for (; i < size; ++i) smallest = x[i].bits < smallest ? x[i].bits : smallest;
    return smallest;
  }
};
template <typename V>
struct PairMaximum<V, BFloat16> : PairMaximum16<V, BFloat16> {
  PairMaximum() {}
};
template <typename V>
struct PairMaximum<V, Half> : PairMaximum16<V, Half> {
  PairMaximum() {}
};

template <typename V, typename T>
MIXCE_BLOCK typename V::Real block_maximum(const T* x, int64_t size) {
  PairMaximum<V, T> maximum;
  int64_t i = 0;
  for (; i + 2 * V::kWidth <= size; i += 2 * V::kWidth) maximum.add(x + i);
  return maximum.of_block(x, i, size);
}

// Elements whose sums stay in lanes of float32, 32 additions to a lane: one that holds the exponential of a
// confident target loses digits of all that is added to it.
template <typename V>
constexpr int64_t kSumBlock = 32 * 2 * V::kWidth < kBlock ? 32 * 2 * V::kWidth : kBlock;

// What is added up of some logits.
template <typename V>
struct BlockSums {
  typename V::Reg exp, shifted, exp_shifted, exp_squared;
};

// Of some logits the exponential relative to the finite reference `m` and, for label smoothing and statistics
// (kMoments), the shifted logit, and the same finite: the clamp keeps 0 * -inf out of their product.
template <typename V>
struct Terms {
  typename V::Reg exp, shifted, finite;
};
template <typename V, bool kCap>
MIXCE_INLINE Terms<V> terms_of(typename V::Reg logits, typename V::Reg m,
                               const Transform<typename V::Real>& transform,
                               const Exponential<V>& exponential) {
  if constexpr (kCap) logits = capped(logits, transform.softcap).value;
  const typename V::Reg d = V::sub(logits, m);
  // The second operand survives a NaN.
  return {exponential.of(d), d, V::max(V::set(static_cast<typename V::Real>(-1e30)), d)};
}

// Adds the first `lanes` lanes.
template <typename V, bool kMoments>
MIXCE_INLINE void add_lanes(const BlockSums<V>& sums, int64_t lanes, OnlineLogSumExp<double>& part) {
  part.sum_exp += lane_sum<V>(sums.exp, lanes);
  if constexpr (kMoments) {
    part.sum_shifted += lane_sum<V>(sums.shifted, lanes);
    part.sum_exp_shifted += lane_sum<V>(sums.exp_shifted, lanes);
    part.sum_exp_squared += lane_sum<V>(sums.exp_squared, lanes);
  }
}

// Pass 1 over the end of a row, fewer elements than a pair.
template <typename V, typename T, bool kCap, bool kMoments, bool kKeep>
MIXCE_BLOCK void add_end(const T* x, int64_t size, typename V::Real m,
                         const Transform<typename V::Real>& transform, const Exponential<V>& exponential,
                         typename V::Real* kept, OnlineLogSumExp<double>& part) {
  for (int64_t i = 0; i < size; i += V::kWidth) {
    const int64_t n = size - i < V::kWidth ? size - i : V::kWidth;
    const auto one = terms_of<V, kCap>(load_edge<V>(x + i, n), V::set(m), transform, exponential);
    add_lanes<V, kMoments>({one.exp, one.shifted, V::mul(one.exp, one.finite), V::mul(one.exp, one.exp)}, n,
                           part);
    if constexpr (kKeep) store_edge<V>(kept + i, one.exp, n);
  }
}

// Pass 1 over one block, relative to the finite reference `m`. With kKeep the exponentials stay in `kept`.
// Meanwhile memory brings the next block, whose pairs go to `next_maximum`.
template <typename V, typename T, bool kCap, bool kMoments, bool kKeep>
MIXCE_BLOCK void add_block(const T* x, int64_t size, typename V::Real m,
                           const Transform<typename V::Real>& transform, const Exponential<V>& exponential,
                           typename V::Real* kept, OnlineLogSumExp<double>& part, const T* next,
                           PairMaximum<V, T>& next_maximum) {
  using Reg = typename V::Reg;
  const Reg reference = V::set(m);
  // Apart, not in a struct, which would stay in memory.
  Reg exp_sum = V::set(0), shifted_sum = exp_sum, exp_shifted_sum = exp_sum, exp_squared_sum = exp_sum;
  PairMaximum<V, T> maximum = next_maximum;
  int64_t i = 0;
#pragma GCC unroll 2
  for (; i + 2 * V::kWidth <= size; i += 2 * V::kWidth) {
    prefetch_ahead<V>(next + i);
    maximum.add(next + i);
    Reg a, b;
    V::load_pair(x + i, &a, &b);
    const auto first = terms_of<V, kCap>(a, reference, transform, exponential);
    const auto second = terms_of<V, kCap>(b, reference, transform, exponential);
    // The pair first: one chain of additions, in one register, is short enough.
    exp_sum = V::add(exp_sum, V::add(first.exp, second.exp));
    if constexpr (kMoments) {
      shifted_sum = V::add(shifted_sum, V::add(first.shifted, second.shifted));
      const Reg product = V::mul(second.exp, second.finite), square = V::mul(second.exp, second.exp);
      exp_shifted_sum = V::add(exp_shifted_sum, V::fma(first.exp, first.finite, product));
      exp_squared_sum = V::add(exp_squared_sum, V::fma(first.exp, first.exp, square));
    }
    if constexpr (kKeep) V::store_pair(kept + i, first.exp, second.exp);
  }
  next_maximum = maximum;
  add_lanes<V, kMoments>({exp_sum, shifted_sum, exp_shifted_sum, exp_squared_sum}, V::kWidth, part);
  if (i < size) {
    add_end<V, T, kCap, kMoments, kKeep>(x + i, size - i, m, transform, exponential, kept + i, part);
  }
  part.count += size;
}

template <typename Real>
struct RowStats {
  OnlineLogSumExp<double> sums;  // in units of (capped) logits
  Real m;                        // largest (capped) logit
  Real raw_maximum;              // largest logit
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
  Real maximum = block_maximum<V>(x, vocab_size < kBlock ? vocab_size : kBlock);
  walk_row(vocab_size, [&](int64_t begin, int64_t size) __attribute__((always_inline)) {
    if (maximum > stats.raw_maximum || begin == 0) {
      stats.raw_maximum = maximum;
      stats.m = capped_scalar<V, T, kCap>(maximum, transform.softcap);
      raise_maximum(stats.sums, static_cast<double>(stats.m),
                    [&](double d) { return exp(transform.scale * d); });
    }
    if constexpr (kKeep) kept[vocab_size + begin / kBlock] = stats.m;
    // Before the first finite logit any finite reference will do.
    const Real reference = stats.m == lowest ? 0 : stats.m;
    const int64_t next_size = vocab_size - begin - size < kBlock ? vocab_size - begin - size : kBlock;
    // A next block that is shorter is not read in step with this one: this one is then read again, from L1.
    const T* const next = x + begin + (next_size == size ? size : 0);
    PairMaximum<V, T> next_maximum;
    for (int64_t i = 0; i < size; i += kSumBlock<V>) {
      const int64_t rest = size - i;
      add_block<V, T, kCap, kMoments, kKeep>(x + begin + i, rest < kSumBlock<V> ? rest : kSumBlock<V>,
                                             reference, transform, exponential, kept + begin + i, stats.sums,
                                             next + i, next_maximum);
    }
    if (next_size == size) {
      maximum = next_maximum.of_block(next, size, size);
    } else if (next_size > 0) {
      maximum = block_maximum<V>(x + begin + size, next_size);
    }
  });
  return stats;
}

}  // namespace
}  // namespace mixce
