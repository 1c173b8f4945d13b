// The two passes over a row of logits, for one instruction set: pass 1 yields the row's statistics, pass 2
// its gradient. A row is taken in blocks that stay in L1: a block is read from memory once, for its maximum,
// and then from L1 for its exponentials. Pass 2 reads the row again: from L2 when it follows pass 1 at once.
#pragma once

#include "../mixce_math.h"
#include "row_kernel_table.h"
#include "simd.h"

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

// Walks a block: edge(i, n) for its ends, n <= kWidth elements at i, and pair(i) for 2 * kWidth elements at
// i. After `head` elements the pairs are aligned, as the caller found them to be.
template <typename V, typename Edge, typename Pair>
MIXCE_INLINE void walk_block(int64_t head, int64_t size, Edge edge, Pair pair) {
  int64_t i = 0;
  for (; i < head; i += V::kWidth) edge(i, head - i < V::kWidth ? head - i : V::kWidth);
  for (i = head; i + 2 * V::kWidth <= size; i += 2 * V::kWidth) pair(i);
  for (; i < size; i += V::kWidth) edge(i, size - i < V::kWidth ? size - i : V::kWidth);
}

// The blocks of a row: body(begin, head, size) for each. The first is longer by the elements that precede the
// first aligned pair at `aligned`, so that every other block begins aligned.
template <typename V, typename T, typename Body>
MIXCE_INLINE void walk_row(const T* aligned, int64_t vocab_size, Body body) {
  constexpr uintptr_t kBytes = 2 * V::kWidth * sizeof(T);
  const uintptr_t past = reinterpret_cast<uintptr_t>(aligned) % kBytes;
  const int64_t head = past == 0 ? 0 : static_cast<int64_t>((kBytes - past) / sizeof(T));
  int64_t begin = 0, first = head < vocab_size ? head : vocab_size;
  while (begin < vocab_size) {
    const int64_t rest = vocab_size - begin;
    const int64_t size = rest < kBlock + first ? rest : kBlock + first;
    body(begin, first, size);
    begin += size;
    first = 0;
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
MIXCE_INLINE typename V::Real block_maximum(const T* x, int64_t head, int64_t size) {
  using Real = typename V::Real;
  using Reg = typename V::Reg;
  Real result = -static_cast<Real>(INFINITY);
  Reg largest_a = V::set(result), largest_b = largest_a;
  walk_block<V>(
      head, size,
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
template <typename V>
MIXCE_INLINE BlockSums<V> zero_sums() {
  return {V::set(0), V::set(0), V::set(0)};
}

// Pass 1 over one block: adds the exponentials of its logits relative to the finite reference `m`, and for
// label smoothing and entropy (kMoments) the shifted logits and their products. With kKeep the exponentials
// stay in `kept`.
template <typename V, typename T, bool kCap, bool kMoments, bool kKeep>
MIXCE_INLINE void add_block(const T* x, int64_t head, int64_t size, typename V::Real m,
                            const Transform<typename V::Real>& transform, const Exponential<V>& exponential,
                            typename V::Real* kept, OnlineLogSumExp<double>& part) {
  using Real = typename V::Real;
  using Reg = typename V::Reg;
  const Reg reference = V::set(m);
  auto add = [&](Reg logits, BlockSums<V>& sums) __attribute__((always_inline)) {
    if constexpr (kCap) logits = capped(logits, transform).value;
    const Reg d = V::sub(logits, reference);
    const Reg e = exponential.of(d);
    sums.exp = V::add(sums.exp, e);
    if constexpr (kMoments) {
      sums.shifted = V::add(sums.shifted, d);
      // The clamp keeps 0 * -inf out; the second operand survives a NaN.
      sums.exp_shifted = V::fma(e, V::max(V::set(static_cast<Real>(-1e30)), d), sums.exp_shifted);
    }
    return e;
  };
  auto add_to_part = [&](const BlockSums<V>& sums, int64_t lanes) {
    part.sum_exp += lane_sum<V>(sums.exp, lanes);
    if constexpr (kMoments) {
      part.sum_shifted += transform.diff_scale * lane_sum<V>(sums.shifted, lanes);
      part.sum_exp_shifted += transform.diff_scale * lane_sum<V>(sums.exp_shifted, lanes);
    }
  };
  BlockSums<V> sums_a = zero_sums<V>(), sums_b = zero_sums<V>();
  walk_block<V>(
      head, size,
      [&](int64_t i, int64_t n) {
        BlockSums<V> sums = zero_sums<V>();
        const Reg e = add(load_edge<V>(x + i, n), sums);
        add_to_part(sums, n);
        if constexpr (kKeep) store_edge<V>(kept + i, e, n);
      },
      [&](int64_t i) __attribute__((always_inline)) {
        Reg a, b;
        V::load_pair(x + i, &a, &b);
        V::prefetch(x + i + kBlock);
        a = add(a, sums_a);
        b = add(b, sums_b);
        if constexpr (kKeep) V::store_pair(kept + i, a, b);
      });
  add_to_part(sums_a, V::kWidth);
  add_to_part(sums_b, V::kWidth);
  part.count += size;
}

template <typename Real>
struct RowStats {
  OnlineLogSumExp<double> sums;
  Real m;            // largest (capped) logit, before diff_scale
  Real raw_maximum;  // largest logit
};

// Pass 1: one read of the row. With kKeep the exponentials of the row stay in kept[0, V), each block's
// relative to its entry of `references`; `aligned` is where the pairs of both passes are aligned.
template <typename V, typename T, bool kCap, bool kMoments, bool kKeep>
MIXCE_INLINE RowStats<typename V::Real> row_stats(const T* x, const T* aligned, int64_t vocab_size,
                                                  const Transform<typename V::Real>& transform,
                                                  const Exponential<V>& exponential, typename V::Real* kept) {
  using Real = typename V::Real;
  const Real lowest = -static_cast<Real>(INFINITY);
  RowStats<Real> stats{empty_log_sum_exp<double>(), lowest, lowest};
  Real* references = kept + vocab_size;
  walk_row<V>(aligned, vocab_size,
              [&](int64_t begin, int64_t head, int64_t size) __attribute__((always_inline)) {
                const Real maximum = block_maximum<V>(x + begin, head, size);
                if (maximum > stats.raw_maximum || begin == 0) {
                  stats.raw_maximum = maximum;
                  stats.m = capped_scalar<V, T, kCap>(maximum, transform);
                  raise_maximum(stats.sums, static_cast<double>(transform.diff_scale) * stats.m);
                }
                // Before the first finite logit any finite reference will do.
                const Real reference = stats.m == lowest ? 0 : stats.m;
                if constexpr (kKeep) *references++ = stats.m;
                add_block<V, T, kCap, kMoments, kKeep>(x + begin, head, size, reference, transform,
                                                       exponential, kept + begin, stats.sums);
              });
  return stats;
}

// What a row's gradient is made from: grad_j = slope_j * (exp(z_j - m) * k - c), and slope_y * t at the
// target.
template <typename Real>
struct GradTerms {
  Real m, k, c, t;
};

// x86 arithmetic keeps the payload of a NaN, and bfloat16 rounding needs its lower bits to be 0.
MIXCE_INLINE float canonical(double value) { return value == value ? static_cast<float>(value) : NAN; }

template <typename Real>
MIXCE_INLINE GradTerms<Real> grad_terms(const Real* state, int64_t rows, Real grad_loss, double logit_scale) {
  const double factor = static_cast<double>(grad_loss) * logit_scale;
  const double m = state[0], s = state[rows], a = state[2 * rows], c = state[3 * rows], t = state[4 * rows];
  return {static_cast<Real>(m), static_cast<Real>(a * factor * exp(-s)), static_cast<Real>(c * factor),
          static_cast<Real>(t * factor)};
}

// Pass 2 over one block; `x` and `grad` may be the same memory. With kKeep the exponentials come from `kept`.
template <typename V, typename T, bool kCap, bool kKeep, bool kStream>
MIXCE_INLINE void grad_block(const T* x, const typename V::Real* kept, T* grad, int64_t head, int64_t size,
                             const GradTerms<typename V::Real>& terms,
                             const Transform<typename V::Real>& transform,
                             const Exponential<V>& exponential) {
  using Reg = typename V::Reg;
  const Reg m = V::set(terms.m), k = V::set(terms.k), c = V::set(terms.c);
  auto grad_of = [&](Reg logits) __attribute__((always_inline)) {
    if constexpr (kKeep) {
      return V::fms(logits, k, c);
    } else if constexpr (kCap) {
      const auto z = capped(logits, transform);
      return V::mul(V::fms(exponential.of(V::sub(z.value, m)), k, c), z.slope);
    } else {
      return V::fms(exponential.of(V::sub(logits, m)), k, c);
    }
  };
  walk_block<V>(
      head, size,
      [&](int64_t i, int64_t n) {
        if constexpr (kKeep) {
          store_edge<V>(grad + i, grad_of(load_edge<V>(kept + i, n)), n);
        } else {
          store_edge<V>(grad + i, grad_of(load_edge<V>(x + i, n)), n);
        }
      },
      [&](int64_t i) __attribute__((always_inline)) {
        Reg a, b;
        if constexpr (kKeep) {
          V::load_pair(kept + i, &a, &b);
        } else {
          V::load_pair(x + i, &a, &b);
        }
        if constexpr (kStream) {
          V::stream_pair(grad + i, grad_of(a), grad_of(b));
        } else {
          V::store_pair(grad + i, grad_of(a), grad_of(b));
        }
      });
}

// Pass 2: one read and one write of the row.
template <typename V, typename T, bool kCap, bool kKeep>
MIXCE_INLINE void row_grad(const T* x, const typename V::Real* kept, T* grad, int64_t vocab_size,
                           int64_t target, GradTerms<typename V::Real> terms,
                           const Transform<typename V::Real>& transform, const Exponential<V>& exponential,
                           bool stream) {
  using Real = typename V::Real;
  // Before the write: the gradient may lie where the logits are.
  Real at_target = terms.t;
  if constexpr (kCap) at_target *= first_lane<V>(capped(V::set(to_real(x[target])), transform).slope);
  const Real* references = kept + vocab_size;
  const Real k = terms.k;
  walk_row<V>(grad, vocab_size,
              [&](int64_t begin, int64_t head, int64_t size) __attribute__((always_inline)) {
                if constexpr (kKeep) {
                  const double shift = transform.diff_scale * (static_cast<double>(*references++) - terms.m);
                  terms.k = shift == 0 ? k : static_cast<Real>(k * exp(shift));
                }
                // An ordinary store to the target's line must not race with a streaming one.
                const bool holds_target = target >= begin && target < begin + size;
                if (stream && !holds_target) {
                  grad_block<V, T, kCap, kKeep, true>(x + begin, kept + begin, grad + begin, head, size,
                                                      terms, transform, exponential);
                } else {
                  grad_block<V, T, kCap, kKeep, false>(x + begin, kept + begin, grad + begin, head, size,
                                                       terms, transform, exponential);
                }
              });
  from_real(at_target, grad + target);
}

}  // namespace
}  // namespace mixce
