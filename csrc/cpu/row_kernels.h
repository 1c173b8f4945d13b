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

template <typename Real>
MIXCE_INLINE Transform<Real> transform_of(const RowParams& p) {
  const bool capped = p.softcap > 0;
  return {static_cast<Real>(capped ? 1.0 : p.logit_scale), static_cast<Real>(p.softcap),
          static_cast<Real>(capped ? p.logit_scale / p.softcap : 0.0)};
}

template <typename T>
MIXCE_INLINE const T* logits_row(const RowParams& p, int64_t row) {
  return static_cast<const T*>(p.logits) + p.logits_rows.offset(row);
}

template <typename T>
MIXCE_INLINE T* grad_row(const RowParams& p, int64_t row) {
  return static_cast<T*>(p.grad_logits) + p.grad_rows.offset(row);
}

// Rows [begin, end): pass 1, epilogue, and with a gradient asked for pass 2 while the row is in L2.
template <typename T, bool kCap, bool kMoments, bool kKeep>
void forward_rows(const RowParams& p, const ForwardParams& f, void* scratch, int64_t begin, int64_t end) {
  using V = typename VectorFor<T>::Type;
  using Real = typename V::Real;
  const Transform<Real> transform = transform_of<Real>(p);
  const Exponential<V> exponential(transform.diff_scale);
  const LossOptions<double> options{p.label_smoothing, p.z_loss};
  Real* const loss = static_cast<Real*>(f.loss);
  Real* const state = static_cast<Real*>(p.state);
  Real* const stats_out = static_cast<Real*>(f.stats);
  Real* const kept = static_cast<Real*>(scratch);

  for (int64_t row = begin; row < end; ++row) {
    const T* x = logits_row<T>(p, row);
    const int64_t target = p.target(row);
    if (target == p.ignore_index) {
      loss[row] = 0;
      for (int i = 0; i < 5; ++i) state[i * p.rows + row] = 0;
      if (stats_out != nullptr) {
        for (int i = 0; i < 5; ++i) stats_out[i * p.rows + row] = 0;
        f.correct[row] = false;
      }
      if (p.grad_logits != nullptr) memset(grad_row<T>(p, row), 0, p.vocab_size * sizeof(T));
      continue;
    }

    // Pass 1.
    T* const grad = p.grad_logits == nullptr ? nullptr : grad_row<T>(p, row);
    const auto stats = row_stats<V, T, kCap, kMoments, kKeep>(x, p.vocab_size, transform, exponential, kept);

    // Epilogue.
    const Real x_target = to_real(x[target]);
    const double z_difference = static_cast<double>(capped_scalar<V, T, kCap>(x_target, transform)) - stats.m;
    const double eta = f.eta == nullptr ? f.eta_value : static_cast<const Real*>(f.eta)[row * f.eta_stride];
    const double s = log(stats.sums.sum_exp);
    const auto terms = token_terms<double>(stats.sums.m, s, transform.diff_scale * z_difference,
                                           stats.sums.sum_shifted / p.vocab_size, eta, p.vocab_size, options);
    loss[row] = static_cast<Real>(terms.loss);
    const double state_row[5] = {stats.m, s, terms.a, terms.c, terms.t};
    for (int i = 0; i < 5; ++i) state[i * p.rows + row] = static_cast<Real>(state_row[i]);
    if (stats_out != nullptr) {
      const double entropy = s - stats.sums.sum_exp_shifted / stats.sums.sum_exp;
      const double stats_row[5] = {terms.nll, terms.q, terms.weight, terms.lse, entropy};
      for (int i = 0; i < 5; ++i) stats_out[i * p.rows + row] = static_cast<Real>(stats_row[i]);
      // The first of the largest: an equal one before the target beats it.
      bool correct = x_target == stats.raw_maximum && terms.nll == terms.nll;
      for (int64_t j = 0; correct && j < target; ++j) correct = to_real(x[j]) != x_target;
      f.correct[row] = correct;
    }

    // Pass 2.
    if (grad != nullptr) {
      const Real grad_loss = static_cast<const Real*>(p.grad_loss)[row * p.grad_loss_stride];
      const auto terms = grad_terms_of<Real>(state + row, p.rows, grad_loss, p.logit_scale);
      row_grad<V, T, kCap, kKeep>(x, kept, grad, p.vocab_size, target, terms, transform, exponential,
                                  p.stream);
    }
  }
}

// Rows [begin, end) of the gradient, from the state of the forward: pass 2 alone.
template <typename T, bool kCap>
void grad_rows(const RowParams& p, int64_t begin, int64_t end) {
  using V = typename VectorFor<T>::Type;
  using Real = typename V::Real;
  const Transform<Real> transform = transform_of<Real>(p);
  const Exponential<V> exponential(transform.diff_scale);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t target = p.target(row);
    if (target == p.ignore_index) {
      memset(grad_row<T>(p, row), 0, p.vocab_size * sizeof(T));
      continue;
    }
    const Real grad_loss = static_cast<const Real*>(p.grad_loss)[row * p.grad_loss_stride];
    const auto grad =
        grad_terms_of<Real>(static_cast<const Real*>(p.state) + row, p.rows, grad_loss, p.logit_scale);
    row_grad<V, T, kCap, false>(logits_row<T>(p, row), nullptr, grad_row<T>(p, row), p.vocab_size, target,
                                grad, transform, exponential, p.stream);
  }
}

// Rows [begin, end) of the gradient times grad_loss, in place; a factor of 1 leaves a row alone.
template <typename T>
void scale_rows(const RowParams& p, int64_t begin, int64_t end) {
  using V = typename VectorFor<T>::Type;
  using Real = typename V::Real;
  for (int64_t row = begin; row < end; ++row) {
    const Real factor =
        static_cast<Real>(canonical(static_cast<const Real*>(p.grad_loss)[row * p.grad_loss_stride]));
    if (factor == 1) continue;
    T* grad = grad_row<T>(p, row);
    const int64_t aligned = elements_to_alignment<V>(grad);
    walk_block<V>(
        aligned < p.vocab_size ? aligned : p.vocab_size, p.vocab_size,
        [&](int64_t i, int64_t n) {
          for (int64_t j = i; j < i + n; ++j) from_real(to_real(grad[j]) * factor, grad + j);
        },
        [&](int64_t i) {
          typename V::Reg a, b;
          V::load_pair(grad + i, &a, &b);
          V::store_pair(grad + i, V::mul(a, V::set(factor)), V::mul(b, V::set(factor)));
        });
  }
}

template <typename T, bool kMoments>
void forward_dispatch_moments(const RowParams& p, const ForwardParams& f, void* scratch, int64_t begin,
                              int64_t end) {
  if (p.softcap > 0) {
    forward_rows<T, true, kMoments, false>(p, f, nullptr, begin, end);
  } else if (scratch != nullptr) {
    forward_rows<T, false, kMoments, true>(p, f, scratch, begin, end);
  } else {
    forward_rows<T, false, kMoments, false>(p, f, nullptr, begin, end);
  }
}

template <typename T>
void forward_dispatch(const RowParams& p, const ForwardParams& f, void* scratch, int64_t begin, int64_t end) {
  if (p.label_smoothing > 0 || f.stats != nullptr) {
    forward_dispatch_moments<T, true>(p, f, scratch, begin, end);
  } else {
    forward_dispatch_moments<T, false>(p, f, scratch, begin, end);
  }
}

template <typename T>
void grad_dispatch(const RowParams& p, int64_t begin, int64_t end) {
  p.softcap > 0 ? grad_rows<T, true>(p, begin, end) : grad_rows<T, false>(p, begin, end);
}

// Rows of this instruction set, by DType.
constexpr RowKernels kRowKernels = {
    {forward_dispatch<float>, forward_dispatch<BFloat16>, forward_dispatch<Half>, forward_dispatch<double>},
    {grad_dispatch<float>, grad_dispatch<BFloat16>, grad_dispatch<Half>, grad_dispatch<double>},
    {scale_rows<float>, scale_rows<BFloat16>, scale_rows<Half>, scale_rows<double>},
};

}  // namespace
}  // namespace mixce
