// The two passes over a row of logits, for one instruction set: pass 1 yields the row's statistics, pass 2
// its gradient. A row is taken in blocks that stay in L1: a block is read from memory once, for its maximum,
// and then from L1 for its exponentials. Pass 2 reads the row again: from L2 when it follows pass 1 at once.
#pragma once

#include "../mixce_math.h"
#include "row_kernel_table.h"
#include "simd.h"

// Work on a block is a function of its own, so that its loop has all registers to itself.
#define MIXCE_BLOCK static __attribute__((noinline))

namespace mixce {
namespace {

// How logits become exponents: fixed for a call. Without a softcap the scale is applied to differences of
// logits, which keeps the digits of logits near 1e5; with one it is applied before the cap.
template <typename Real>
struct Transform {
  Real diff_scale;  // from a difference of (capped) logits to one of z
  Real cap, tanh_scale;
};

// cap * tanh(tanh_scale * x) and its slope by its argument, 1 - tanh^2, without the cancellation.
template <typename V>
struct Capped {
  typename V::Reg value, slope;
};

MIXCE_INLINE Capped<FloatVector> capped(FloatVector::Reg x, const Transform<float>& transform) {
  using V = FloatVector;
  constexpr float kFactor = 2 * kLog2E;
  const V::Reg u = V::mul(x, V::set(transform.tanh_scale));
  const V::Reg d = V::sub(V::set(0.0f), V::magnitude(u));
  const Exp2Parts parts = exp2_parts(d, V::set(kFactor), V::set(-127.0f / kFactor));
  // expm1(-2|u|) = 2^n * p * f + (2^n - 1); tanh|u| = -expm1 / (expm1 + 2).
  const V::Reg expm1 = V::fma(V::mul(parts.power, parts.p), parts.f, V::sub(parts.power, V::set(1.0f)));
  const V::Reg inverse = V::div(V::set(1.0f), V::add(expm1, V::set(2.0f)));
  const V::Reg tanh_magnitude = V::mul(V::sub(V::set(0.0f), expm1), inverse);
  const V::Reg exponential = V::add(expm1, V::set(1.0f));
  const V::Reg slope = V::mul(V::mul(V::set(4.0f), exponential), V::mul(inverse, inverse));
  return {V::mul(V::set(transform.cap), V::with_sign_of(tanh_magnitude, u)), slope};
}

MIXCE_INLINE Capped<DoubleVector> capped(double x, const Transform<double>& transform) {
  const double t = tanh(transform.tanh_scale * x);
  return {transform.cap * t, (1 - t) * (1 + t)};
}

template <typename V>
MIXCE_INLINE typename V::Real first_lane(typename V::Reg reg) {
  typename V::Real lanes[V::kWidth];
  V::store(lanes, reg);
  return lanes[0];
}

template <typename V, typename T, bool kCap>
MIXCE_INLINE typename V::Real capped_scalar(typename V::Real x,
                                            const Transform<typename V::Real>& transform) {
  if constexpr (kCap) return first_lane<V>(capped(V::set(x), transform).value);
  return x;
}

// Elements before the first address at or after `x` that is aligned for a pair of vectors.
template <typename V, typename T>
MIXCE_INLINE int64_t elements_to_alignment(const T* x) {
  constexpr uintptr_t kBytes = 2 * V::kWidth * sizeof(T);
  return static_cast<int64_t>(-reinterpret_cast<uintptr_t>(x) % kBytes / sizeof(T));
}

// Walks a block: pair(i) for 2 * kWidth elements at i, from `head` on, and edge(i, n) for n <= kWidth
// elements before and after them.
template <typename V, typename Edge, typename Pair>
MIXCE_INLINE void walk_block(int64_t head, int64_t size, Edge edge, Pair pair) {
  int64_t i = 0;
  for (; i < head; i += V::kWidth) edge(i, head - i < V::kWidth ? head - i : V::kWidth);
  for (i = head; i + 2 * V::kWidth <= size; i += 2 * V::kWidth) pair(i);
  for (; i < size; i += V::kWidth) edge(i, size - i < V::kWidth ? size - i : V::kWidth);
}

// The blocks of a row: body(begin, size) for each.
template <typename Body>
MIXCE_INLINE void walk_row(int64_t vocab_size, Body body) {
  for (int64_t begin = 0; begin < vocab_size; begin += kBlock) {
    body(begin, vocab_size - begin < kBlock ? vocab_size - begin : kBlock);
  }
}

// The n <= kWidth elements at x, in order, in a vector whose other lanes are 0.
template <typename V, typename T>
MIXCE_INLINE typename V::Reg load_edge(const T* x, int64_t n) {
  typename V::Real padded[V::kWidth] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = to_real(x[i]);
  return V::load(padded);
}

template <typename V, typename T>
MIXCE_INLINE void store_edge(T* out, typename V::Reg value, int64_t n) {
  typename V::Real padded[V::kWidth];
  V::store(padded, value);
  for (int64_t i = 0; i < n; ++i) from_real(padded[i], out + i);
}

template <bool value>
struct Bool {
  static constexpr bool kValue = value;
};

template <typename V, bool kStream, typename T>
MIXCE_INLINE void put_pair(T* out, typename V::Reg a, typename V::Reg b) {
  if constexpr (kStream) {
    V::stream_pair(out, a, b);
  } else {
    V::store_pair(out, a, b);
  }
}

// The first `lanes` lanes, added in float64.
template <typename V>
MIXCE_INLINE double lane_sum(typename V::Reg reg, int64_t lanes) {
  typename V::Real values[V::kWidth];
  V::store(values, reg);
  double sum = 0;
  for (int64_t k = 0; k < lanes; ++k) sum += values[k];
  return sum;
}

// The largest of a block, -inf if none is larger; NaNs are passed over, the sums will meet them.
template <typename V, typename T>
MIXCE_BLOCK typename V::Real block_maximum(const T* x, int64_t size) {
  using Real = typename V::Real;
  using Reg = typename V::Reg;
  Real result = -static_cast<Real>(INFINITY);
  Reg largest_a = V::set(result), largest_b = largest_a;
  walk_block<V>(
      0, size,
      [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        for (int64_t j = i; j < i + n; ++j) result = to_real(x[j]) > result ? to_real(x[j]) : result;
      },
      [&](int64_t i) __attribute__((always_inline)) {
        Reg a, b;
        V::load_pair(x + i, &a, &b);
        largest_a = V::max(a, largest_a);
        largest_b = V::max(b, largest_b);
      });
  Real lanes[V::kWidth];
  V::store(lanes, V::max(largest_a, largest_b));
  for (int k = 0; k < V::kWidth; ++k) result = lanes[k] > result ? lanes[k] : result;
  return result;
}

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
  if constexpr (kCap) logits = capped(logits, transform).value;
  const typename V::Reg d = V::sub(logits, m);
  const typename V::Reg e = exponential.of(d);
  // The clamp keeps 0 * -inf out; the second operand survives a NaN.
  return {e, d, kMoments ? V::mul(e, V::max(V::set(static_cast<typename V::Real>(-1e30)), d)) : e};
}

// Adds the first `lanes` lanes.
template <typename V, bool kMoments>
MIXCE_INLINE void add_lanes(const BlockSums<V>& sums, int64_t lanes, double diff_scale,
                            OnlineLogSumExp<double>& part) {
  part.sum_exp += lane_sum<V>(sums.exp, lanes);
  if constexpr (kMoments) {
    part.sum_shifted += diff_scale * lane_sum<V>(sums.shifted, lanes);
    part.sum_exp_shifted += diff_scale * lane_sum<V>(sums.exp_shifted, lanes);
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
    add_lanes<V, kMoments>(sums, n, transform.diff_scale, part);
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
  add_lanes<V, kMoments>({exp_sum, shifted_sum, exp_shifted_sum}, V::kWidth, transform.diff_scale, part);
  if (i < size) {
    add_end<V, T, kCap, kMoments, kKeep>(x + i, size - i, m, transform, exponential, kept + i, part);
  }
  part.count += size;
}

template <typename Real>
struct RowStats {
  OnlineLogSumExp<double> sums;
  Real m;            // largest (capped) logit, before diff_scale
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
      stats.m = capped_scalar<V, T, kCap>(maximum, transform);
      raise_maximum(stats.sums, static_cast<double>(transform.diff_scale) * stats.m);
    }
    if constexpr (kKeep) kept[vocab_size + begin / kBlock] = stats.m;
    // Before the first finite logit any finite reference will do.
    const Real reference = stats.m == lowest ? 0 : stats.m;
    add_block<V, T, kCap, kMoments, kKeep>(x + begin, size, reference, transform, exponential, kept + begin,
                                           stats.sums);
  });
  return stats;
}

// What a row's gradient is made from: grad_j = slope_j * (exp(z_j - m) * k - c), and slope_y * t at the
// target.
template <typename Real>
struct GradTerms {
  Real m, k, c, t;
};

// The NaN with only zeros in its lower bits, as bfloat16 rounding needs it: arithmetic may keep a payload.
MIXCE_INLINE double canonical(double value) { return value == value ? value : NAN; }

template <typename Real>
MIXCE_INLINE GradTerms<Real> grad_terms(const Real* state, int64_t rows, Real grad_loss, double logit_scale) {
  const double factor = static_cast<double>(grad_loss) * logit_scale;
  const double m = state[0], s = state[rows], a = state[2 * rows], c = state[3 * rows], t = state[4 * rows];
  return {static_cast<Real>(m), static_cast<Real>(canonical(a * factor * exp(-s))),
          static_cast<Real>(canonical(c * factor)), static_cast<Real>(canonical(t * factor))};
}

// Pass 2 over one block from its logits; `x` and `grad` may be the same memory.
template <typename V, typename T, bool kCap, bool kStream>
MIXCE_BLOCK void grad_block(const T* x, T* grad, int64_t head, int64_t size,
                            const GradTerms<typename V::Real>& terms,
                            const Transform<typename V::Real>& transform, const Exponential<V>& exponential) {
  using Reg = typename V::Reg;
  const Reg m = V::set(terms.m), k = V::set(terms.k), c = V::set(terms.c);
  auto grad_of = [&](Reg logits) __attribute__((always_inline)) {
    if constexpr (kCap) {
      const auto z = capped(logits, transform);
      return V::mul(V::fms(exponential.of(V::sub(z.value, m)), k, c), z.slope);
    } else {
      return V::fms(exponential.of(V::sub(logits, m)), k, c);
    }
  };
  walk_block<V>(
      head, size, [&](int64_t i, int64_t n) { store_edge<V>(grad + i, grad_of(load_edge<V>(x + i, n)), n); },
      [&](int64_t i) __attribute__((always_inline)) {
        Reg a, b;
        V::load_pair(x + i, &a, &b);
        put_pair<V, kStream>(grad + i, grad_of(a), grad_of(b));
      });
}

// Pass 2 over one block from the exponentials that pass 1 kept. `head` elements come before the first aligned
// pair; the pairs at both ends overlap their neighbours, writing the same values twice.
template <typename V, typename T, bool kStream>
MIXCE_BLOCK void grad_block_from_kept(const typename V::Real* kept, T* grad, int64_t head, int64_t size,
                                      typename V::Real k_scalar, typename V::Real c_scalar) {
  using Reg = typename V::Reg;
  const Reg k = V::set(k_scalar), c = V::set(c_scalar);
  auto grad_of = [&](Reg exponentials) __attribute__((always_inline)) { return V::fms(exponentials, k, c); };
  auto pair = [&](int64_t i, auto stream) __attribute__((always_inline)) {
    Reg a, b;
    V::load_pair(kept + i, &a, &b);
    put_pair<V, decltype(stream)::kValue>(grad + i, grad_of(a), grad_of(b));
  };
  const bool overlap = head > 0 && size >= 2 * V::kWidth;
  if (overlap) {
    pair(0, Bool<false>());
    pair(size - 2 * V::kWidth, Bool<false>());
  }
  walk_block<V>(
      overlap ? head : 0, size,
      [&](int64_t i, int64_t n) {
        if (!overlap) store_edge<V>(grad + i, grad_of(load_edge<V>(kept + i, n)), n);
      },
      [&](int64_t i) __attribute__((always_inline)) { pair(i, Bool<kStream>()); });
}

// Pass 2: one write of the row, after a read of it or, with kKeep, of the exponentials of pass 1.
template <typename V, typename T, bool kCap, bool kKeep>
MIXCE_INLINE void row_grad(const T* x, const typename V::Real* kept, T* grad, int64_t vocab_size,
                           int64_t target, const GradTerms<typename V::Real>& terms,
                           const Transform<typename V::Real>& transform, const Exponential<V>& exponential,
                           bool stream) {
  using Real = typename V::Real;
  // Before the write: the gradient may lie where the logits are.
  Real at_target = terms.t;
  if constexpr (kCap) at_target *= first_lane<V>(capped(V::set(to_real(x[target])), transform).slope);
  const int64_t aligned = elements_to_alignment<V>(grad);
  // Pairs of bfloat16 are kept in an order of their own, which must be that of pass 1.
  const bool fixed_order = kKeep && !V::template kPairsInOrder<T>;
  walk_row(vocab_size, [&](int64_t begin, int64_t size) __attribute__((always_inline)) {
    // An ordinary store to the target's line must not race with a streaming one.
    const bool holds_target = target >= begin && target < begin + size;
    const bool streams = stream && !holds_target && !(fixed_order && aligned > 0);
    const int64_t head = fixed_order ? 0 : aligned < size ? aligned : size;
    if constexpr (kKeep) {
      const double shift =
          transform.diff_scale * (static_cast<double>(kept[vocab_size + begin / kBlock]) - terms.m);
      const Real k = shift == 0 ? terms.k : static_cast<Real>(terms.k * exp(shift));
      if (streams) {
        grad_block_from_kept<V, T, true>(kept + begin, grad + begin, head, size, k, terms.c);
      } else {
        grad_block_from_kept<V, T, false>(kept + begin, grad + begin, head, size, k, terms.c);
      }
    } else if (streams) {
      grad_block<V, T, kCap, true>(x + begin, grad + begin, head, size, terms, transform, exponential);
    } else {
      grad_block<V, T, kCap, false>(x + begin, grad + begin, head, size, terms, transform, exponential);
    }
  });
  from_real(at_target, grad + target);
}

}  // namespace
}  // namespace mixce
