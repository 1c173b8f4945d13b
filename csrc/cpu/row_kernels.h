// Rows of logits for one instruction set: walks rows, runs the two passes and the epilogue
// between them.
#pragma once

#include "row_grad.h"
#include "row_kernel_table.h"
#include "row_stats.h"

namespace mixce {
namespace {

template <typename T>
struct VectorFor {
  using Type = FloatVector;
};
template <>
struct VectorFor<double> {
  using Type = DoubleVector;
};

// Rows [begin, end): pass 1, epilogue, and with a gradient asked for pass 2 while the row is in L2.
template <typename T, bool kCap, bool kMoments, bool kKeep>
void forward_rows(const RowParams& p, const ForwardParams& f, bool streaming_stores, void* scratch,
                  int64_t begin, int64_t end) {
  using V = typename VectorFor<T>::Type;
  using Real = typename V::Real;
  Real* const kept = static_cast<Real*>(scratch);

  for (int64_t row = begin; row < end; ++row) {
    const T* x = logits_row<T>(p, row);
    const int64_t target = target_at(p, row);
    if (target == p.options.ignore_index) {
      store_ignored_row<Real>(p, f, row);
      if (p.grad_logits != nullptr) memset(grad_row<T>(p, row), 0, p.vocab_size * sizeof(T));
      continue;
    }

    // Pass 1.
    const Transform<Real> transform = transform_of<Real>(p, row);
    const Exponential<V> exponential(transform.scale);
    const auto stats = row_stats<V, T, kCap, kMoments, kKeep>(x, p.vocab_size, transform, exponential, kept);

    // Epilogue.
    const Real x_target = to_real(x[target]);
    const Real z_target = capped_scalar<V, T, kCap>(x_target, transform.softcap);
    const double s = log(stats.sums.sum_exp);
    const double sum_exp = stats.sums.sum_exp;
    const double scale = transform.scale;
    const RowSums sums = {
        s, scale * (static_cast<double>(z_target) - stats.m), scale * stats.sums.sum_shifted / p.vocab_size,
        scale * stats.sums.sum_exp_shifted / sum_exp, stats.sums.sum_exp_squared / (sum_exp * sum_exp)};
    const auto terms = token_terms<Real, double>(scale * stats.sums.m, sums, mixture_at<Real>(p, f, row),
                                                 p.vocab_size, p.options);
    Real state[kStateWidth];
    fill_state(stats.m, s, terms, state);
    store_loss(p, f, row, terms.loss, state);
    if (f.stats != nullptr) {
      // An equal logit before the target beats it.
      bool first_of_largest = x_target == stats.raw_maximum;
      for (int64_t j = 0; first_of_largest && j < target; ++j) first_of_largest = to_real(x[j]) != x_target;
      store_stats<Real>(p, f, row, terms, sums, first_of_largest);
    }

    // Pass 2.
    if (p.grad_logits != nullptr) {
      row_grad<V, T, kCap, false, kKeep>(x, kept, grad_row<T>(p, row), p.vocab_size, target,
                                         pass_2_terms<false>(p, row, state), transform, exponential,
                                         streaming_stores);
    }
  }
}

// Rows [begin, end) of the gradient, from the state of the forward: pass 2 alone.
template <typename T, bool kCap, bool kEntropy>
void grad_rows(const RowParams& p, bool streaming_stores, int64_t begin, int64_t end) {
  using V = typename VectorFor<T>::Type;
  using Real = typename V::Real;
  for (int64_t row = begin; row < end; ++row) {
    T* const grad = grad_row<T>(p, row);
    const int64_t target = target_at(p, row);
    if (target == p.options.ignore_index) {
      memset(grad, 0, p.vocab_size * sizeof(T));
      continue;
    }
    Real state[kStateWidth];
    load_state(p, row, state);
    const Transform<Real> transform = transform_of<Real>(p, row);
    const Exponential<V> exponential(transform.scale);
    row_grad<V, T, kCap, kEntropy, false>(logits_row<T>(p, row), nullptr, grad, p.vocab_size, target,
                                          pass_2_terms<kEntropy>(p, row, state), transform, exponential,
                                          streaming_stores);
  }
}

// Rows [begin, end) of the gradient times their factors, in place; a factor of 1 leaves a row alone.
template <typename T>
void scale_rows(const RowParams& p, int64_t begin, int64_t end) {
  using V = typename VectorFor<T>::Type;
  using Real = typename V::Real;
  for (int64_t row = begin; row < end; ++row) {
    const Real factor = static_cast<Real>(canonical(row_factor_at<Real>(p, row)));
    if (factor == 1) continue;
    T* grad = grad_row<T>(p, row);
    const int64_t aligned = elements_to_alignment<V>(grad);
    walk_block<V>(
        aligned < p.vocab_size ? aligned : p.vocab_size, p.vocab_size,
        [&](int64_t i, int64_t n) {
          for (int64_t j = i; j < i + n; ++j) from_real(to_real(grad[j]) * factor, grad + j);
        },
        [&](int64_t i) {
          prefetch_ahead<V>(grad + i);
          typename V::Reg a, b;
          V::load_pair(grad + i, &a, &b);
          V::store_pair(grad + i, V::mul(a, V::set(factor)), V::mul(b, V::set(factor)));
        });
  }
}

template <typename T, bool kMoments>
void forward_dispatch_moments(const RowParams& p, const ForwardParams& f, bool streaming_stores,
                              void* scratch, int64_t begin, int64_t end) {
  if (has_softcap(p.options)) {
    forward_rows<T, true, kMoments, false>(p, f, streaming_stores, nullptr, begin, end);
  } else if (scratch != nullptr) {
    forward_rows<T, false, kMoments, true>(p, f, streaming_stores, scratch, begin, end);
  } else {
    forward_rows<T, false, kMoments, false>(p, f, streaming_stores, nullptr, begin, end);
  }
}

template <typename T>
void forward_dispatch(const RowParams& p, const ForwardParams& f, bool streaming_stores, void* scratch,
                      int64_t begin, int64_t end) {
  if (needs_moments(p.options) || f.stats != nullptr) {
    forward_dispatch_moments<T, true>(p, f, streaming_stores, scratch, begin, end);
  } else {
    forward_dispatch_moments<T, false>(p, f, streaming_stores, scratch, begin, end);
  }
}

template <typename T>
void grad_dispatch(const RowParams& p, bool streaming_stores, int64_t begin, int64_t end) {
  const bool cap = has_softcap(p.options), entropy = p.grad_entropy != nullptr;
  const auto rows = cap       ? entropy ? grad_rows<T, true, true> : grad_rows<T, true, false>
                    : entropy ? grad_rows<T, false, true>
                              : grad_rows<T, false, false>;
  rows(p, streaming_stores, begin, end);
}

// Rows of this instruction set, by DType.
constexpr RowKernels kRowKernels = {
    {forward_dispatch<float>, forward_dispatch<BFloat16>, forward_dispatch<Half>, forward_dispatch<double>},
    {grad_dispatch<float>, grad_dispatch<BFloat16>, grad_dispatch<Half>, grad_dispatch<double>},
    {scale_rows<float>, scale_rows<BFloat16>, scale_rows<Half>, scale_rows<double>},
};

}  // namespace
}  // namespace mixce
