// Pass 2 over a row: its gradient, from the logits, which are in L2 when it follows pass 1 at once, or from
// the exponentials that pass 1 kept.
#pragma once

#include "blocks.h"

namespace mixce {
namespace {

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
#pragma GCC unroll 2
  for (i = head; i + 2 * V::kWidth <= size; i += 2 * V::kWidth) pair(i);
  for (; i < size; i += V::kWidth) edge(i, size - i < V::kWidth ? size - i : V::kWidth);
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

// The NaN with only zeros in its lower bits, as bfloat16 rounding needs it: arithmetic may keep a payload.
MIXCE_INLINE double canonical(double value) { return value == value ? value : NAN; }

// A row's terms for pass 2 in the type of its arithmetic.
template <bool kEntropy, typename Real>
MIXCE_INLINE GradTerms<Real> pass_2_terms(const RowParams& p, int64_t row, const Real (&state)[kStateWidth]) {
  const auto terms = grad_terms_at<double, kEntropy>(p, row, state, row_scale<Real>(p, row));
  return {static_cast<Real>(terms.m), static_cast<Real>(canonical(terms.k)),
          static_cast<Real>(canonical(terms.c)), static_cast<Real>(canonical(terms.t)),
          static_cast<Real>(canonical(terms.b))};
}

// Pass 2 over one block from its logits; `x` and `grad` may be the same memory.
template <typename V, typename T, bool kCap, bool kEntropy, bool kStream>
MIXCE_BLOCK void grad_block(const T* x, T* grad, int64_t head, int64_t size,
                            const GradTerms<typename V::Real>& terms,
                            const Transform<typename V::Real>& transform, const Exponential<V>& exponential) {
  using Reg = typename V::Reg;
  const Reg m = V::set(terms.m), k = V::set(terms.k), b = V::set(terms.b), c = V::set(terms.c);
  const Reg lowest = V::set(kLowestDifference<typename V::Real>);
  auto by_exponent = [&](Reg d) __attribute__((always_inline)) {
    // The second operand survives a NaN.
    if constexpr (kEntropy) return V::fms(exponential.of(d), V::fma(b, V::max(lowest, d), k), c);
    return V::fms(exponential.of(d), k, c);
  };
  auto grad_of = [&](Reg logits) __attribute__((always_inline)) {
    if constexpr (kCap) {
      const auto z = capped(logits, transform.softcap);
      return V::mul(by_exponent(V::sub(z.value, m)), z.slope);
    } else {
      return by_exponent(V::sub(logits, m));
    }
  };
  walk_block<V>(
      head, size, [&](int64_t i, int64_t n) { store_edge<V>(grad + i, grad_of(load_edge<V>(x + i, n)), n); },
      [&](int64_t i) __attribute__((always_inline)) {
        prefetch_ahead<V>(x + i);
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

// Pass 2: one write of the row, after a read of it or, with kKeep, of the exponentials of pass 1. A target
// outside of [0, vocab_size) is in another shard of the vocabulary.
template <typename V, typename T, bool kCap, bool kEntropy, bool kKeep>
MIXCE_INLINE void row_grad(const T* x, const typename V::Real* kept, T* grad, int64_t vocab_size,
                           int64_t target, const GradTerms<typename V::Real>& terms,
                           const Transform<typename V::Real>& transform, const Exponential<V>& exponential,
                           bool stream) {
  using Real = typename V::Real;
  // Before the write: the gradient may lie where the logits are.
  const bool known = target >= 0 && target < vocab_size;
  Real at_target = terms.t;
  if constexpr (kCap) {
    if (known) at_target *= first_lane<V>(capped(V::set(to_real(x[target])), transform.softcap).slope);
  }
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
          transform.scale * (static_cast<double>(kept[vocab_size + begin / kBlock]) - terms.m);
      const Real k = shift == 0 ? terms.k : static_cast<Real>(terms.k * exp(shift));
      if (streams) {
        grad_block_from_kept<V, T, true>(kept + begin, grad + begin, head, size, k, terms.c);
      } else {
        grad_block_from_kept<V, T, false>(kept + begin, grad + begin, head, size, k, terms.c);
      }
    } else if (streams) {
      grad_block<V, T, kCap, kEntropy, true>(x + begin, grad + begin, head, size, terms, transform,
                                             exponential);
    } else {
      grad_block<V, T, kCap, kEntropy, false>(x + begin, grad + begin, head, size, terms, transform,
                                              exponential);
    }
  });
  if (known) from_real(at_target, grad + target);
}

}  // namespace
}  // namespace mixce
