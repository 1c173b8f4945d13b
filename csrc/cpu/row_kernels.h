// The two passes over a row of logits, for one instruction set: pass 1 yields the row's statistics, pass 2 its gradient.
// A row is taken in blocks that stay in L1: a block is read from memory once, for its maximum, and then from L1 for its
// exponentials. Pass 2 reads the row again: from L2 when it follows pass 1 at once.
#pragma once

#include "../mixce_math.h"
#include "../params.h"
#include "row_kernel_table.h"
#include "simd.h"

namespace mixce {
namespace {

constexpr int64_t kBlock = 2048;     // 8 KiB of float32, a quarter of the smallest L1
constexpr int64_t kGradBlock = 512;  // the unit in which pass 2 chooses between streaming and ordinary stores
constexpr int kUnroll = 4;           // vectors in flight, to hide the latency of a chain of fused multiply-adds

// How logits become exponents: fixed for a call. Without a softcap the scale is applied to differences of logits, which
// keeps the digits of logits near 1e5; with one it is applied before the cap.
template <typename Real>
struct Transform {
  Real diff_scale;  // from a difference of (capped) logits to one of z
  Real cap, tanh_scale;
};

template <typename V>
struct Exponent;

template <>
struct Exponent<FloatVector> {
  using V = FloatVector;
  V::Reg factor, lowest;

  explicit Exponent(float diff_scale) {
    const float log2e_scaled = diff_scale * 0x1.715476p0f;
    factor = V::set(log2e_scaled);
    lowest = V::set(-127.0f / log2e_scaled);
  }
  // exp(diff_scale * d) for d <= 0, to the accuracy of Exp2Polynomial<degree>.
  template <int degree>
  V::Reg of(V::Reg d) const {
    const Exp2Parts parts = exp2_parts<degree>(d, factor, lowest);
    return V::mul(V::fma(parts.p, parts.f, V::set(1.0f)), parts.power);
  }
};

template <>
struct Exponent<DoubleVector> {
  double diff_scale;

  explicit Exponent(double scale) : diff_scale(scale) {}
  template <int degree>
  double of(double d) const {
    return exp(diff_scale * d);
  }
};

// cap * tanh(tanh_scale * x) and its slope by its argument, 1 - tanh^2, without the cancellation.
template <typename V>
struct Capped {
  typename V::Reg value, slope;
};

MIXCE_INLINE Capped<FloatVector> capped(FloatVector::Reg x, const Transform<float>& transform) {
  using V = FloatVector;
  constexpr float kFactor = 2 * 0x1.715476p0f;
  const V::Reg u = V::mul(x, V::set(transform.tanh_scale));
  const V::Reg d = V::sub(V::set(0.0f), V::magnitude(u));
  const Exp2Parts parts = exp2_parts<6>(d, V::set(kFactor), V::set(-127.0f / kFactor));
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
MIXCE_INLINE typename V::Real capped_scalar(typename V::Real x, const Transform<typename V::Real>& transform) {
  if constexpr (kCap) return first_lane<V>(capped(V::set(x), transform).value);
  return x;
}

// Calls body(offset) for whole groups of kUnroll vectors, then for single ones; returns the number of elements covered.
template <typename V, typename Group, typename Single>
MIXCE_INLINE int64_t for_vectors(int64_t size, Group group, Single single) {
  constexpr int64_t kStep = kUnroll * V::kWidth;
  int64_t i = 0;
  for (; i + kStep <= size; i += kStep) group(i);
  for (; i + V::kWidth <= size; i += V::kWidth) single(i);
  return i;
}

// The largest of x[0, size), -inf if none is larger; NaNs are passed over, the sums will meet them.
template <typename V, typename T>
MIXCE_INLINE typename V::Real block_maximum(const T* x, int64_t size) {
  using Real = typename V::Real;
  typename V::Reg largest[kUnroll];
  for (auto& reg : largest) reg = V::set(-static_cast<Real>(INFINITY));
  const int64_t covered = for_vectors<V>(
      size,
      [&](int64_t i) {
        for (int k = 0; k < kUnroll; ++k) largest[k] = V::max(V::load(x + i + k * V::kWidth), largest[k]);
      },
      [&](int64_t i) { largest[0] = V::max(V::load(x + i), largest[0]); });
  largest[0] = V::max(V::max(largest[0], largest[1]), V::max(largest[2], largest[3]));
  Real lanes[V::kWidth];
  V::store(lanes, largest[0]);
  Real result = lanes[0];
  for (int k = 1; k < V::kWidth; ++k) result = lanes[k] > result ? lanes[k] : result;
  for (int64_t i = covered; i < size; ++i) result = to_real(x[i]) > result ? to_real(x[i]) : result;
  return result;
}

template <typename V>
struct BlockSums {
  typename V::Reg exp, shifted, exp_shifted;

  MIXCE_INLINE BlockSums zero() { return {V::set(0), V::set(0), V::set(0)}; }
};

// Adds the first `lanes` lanes.
template <typename V>
MIXCE_INLINE double lane_sum(typename V::Reg reg, int64_t lanes) {
  typename V::Real values[V::kWidth];
  V::store(values, reg);
  double sum = 0;
  for (int64_t k = 0; k < lanes; ++k) sum += values[k];
  return sum;
}

// Pass 1 over one block: adds the exponentials of x[0, size) relative to the finite reference `m`, and with them the
// shifted logits (kSmooth) and their product (kEntropy).
template <typename V, typename T, bool kCap, bool kSmooth, bool kEntropy>
MIXCE_INLINE void add_block(const T* x, int64_t size, typename V::Real m, const Transform<typename V::Real>& transform,
                            const Exponent<V>& exponent, OnlineLogSumExp<double>& part) {
  using Real = typename V::Real;
  using Reg = typename V::Reg;
  const Reg reference = V::set(m);
  auto add = [&](Reg logits, BlockSums<V>& sums) __attribute__((always_inline)) {
    if constexpr (kCap) logits = capped(logits, transform).value;
    const Reg d = V::sub(logits, reference);
    const Reg e = exponent.template of<5>(d);
    sums.exp = V::add(sums.exp, e);
    if constexpr (kSmooth) sums.shifted = V::add(sums.shifted, d);
    // The clamp keeps 0 * -inf out; the second operand survives a NaN.
    if constexpr (kEntropy) sums.exp_shifted = V::fma(e, V::max(V::set(static_cast<Real>(-1e30)), d), sums.exp_shifted);
  };
  auto add_to_part = [&](const BlockSums<V>& sums, int64_t lanes) {
    part.sum_exp += lane_sum<V>(sums.exp, lanes);
    if constexpr (kSmooth) part.sum_shifted += transform.diff_scale * lane_sum<V>(sums.shifted, lanes);
    if constexpr (kEntropy) part.sum_exp_shifted += transform.diff_scale * lane_sum<V>(sums.exp_shifted, lanes);
  };

  BlockSums<V> sums[kUnroll];
  for (auto& accumulator : sums) accumulator = BlockSums<V>::zero();
  const int64_t covered = for_vectors<V>(
      size,
      [&](int64_t i) __attribute__((always_inline)) {
        for (int k = 0; k < kUnroll; ++k) add(V::load(x + i + k * V::kWidth), sums[k]);
      },
      [&](int64_t i) __attribute__((always_inline)) { add(V::load(x + i), sums[0]); });
  for (const auto& accumulator : sums) add_to_part(accumulator, V::kWidth);
  if (covered < size) {
    T padded[V::kWidth] = {};
    for (int64_t i = covered; i < size; ++i) padded[i - covered] = x[i];
    BlockSums<V> tail = BlockSums<V>::zero();
    add(V::load(padded), tail);
    add_to_part(tail, size - covered);
  }
  part.count += size;
}

template <typename Real>
struct RowStats {
  OnlineLogSumExp<double> sums;
  Real m;           // largest (capped) logit, before diff_scale
  Real raw_maximum;  // largest logit
};

// Pass 1: one read of the row.
template <typename V, typename T, bool kCap, bool kSmooth, bool kEntropy>
MIXCE_INLINE RowStats<typename V::Real> row_stats(const T* x, int64_t vocab_size,
                                                  const Transform<typename V::Real>& transform,
                                                  const Exponent<V>& exponent) {
  using Real = typename V::Real;
  const Real lowest = -static_cast<Real>(INFINITY);
  RowStats<Real> stats{empty_log_sum_exp<double>(), lowest, lowest};
  for (int64_t begin = 0; begin < vocab_size; begin += kBlock) {
    const int64_t size = vocab_size - begin < kBlock ? vocab_size - begin : kBlock;
    const Real maximum = block_maximum<V>(x + begin, size);
    if (maximum > stats.raw_maximum || begin == 0) {
      stats.raw_maximum = maximum;
      stats.m = capped_scalar<V, T, kCap>(maximum, transform);
      raise_maximum(stats.sums, static_cast<double>(transform.diff_scale) * stats.m);
    }
    // Before the first finite logit any finite reference will do.
    const Real reference = stats.m == lowest ? 0 : stats.m;
    add_block<V, T, kCap, kSmooth, kEntropy>(x + begin, size, reference, transform, exponent, stats.sums);
  }
  return stats;
}

// What a row's gradient is made from: grad_j = slope_j * (exp(z_j - m) * k - c), and slope_y * t at the target.
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

template <typename T>
struct GradDegree {
  static constexpr int value = 5;
};
template <>
struct GradDegree<BFloat16> {
  static constexpr int value = 3;
};
template <>
struct GradDegree<Half> {
  static constexpr int value = 4;
};

// Pass 2 over one block; `x` and `grad` may be the same memory. kStream: `grad` is aligned to a vector and its lines do
// not pass through the cache.
template <typename V, typename T, bool kCap, bool kStream>
MIXCE_INLINE void grad_block(const T* x, T* grad, int64_t size, const GradTerms<typename V::Real>& terms,
                             const Transform<typename V::Real>& transform, const Exponent<V>& exponent) {
  using Reg = typename V::Reg;
  const Reg m = V::set(terms.m), k = V::set(terms.k), c = V::set(terms.c);
  auto grad_of = [&](Reg logits) __attribute__((always_inline)) {
    if constexpr (kCap) {
      const auto z = capped(logits, transform);
      return V::mul(V::fms(exponent.template of<GradDegree<T>::value>(V::sub(z.value, m)), k, c), z.slope);
    } else {
      return V::fms(exponent.template of<GradDegree<T>::value>(V::sub(logits, m)), k, c);
    }
  };
  auto put = [&](int64_t i) __attribute__((always_inline)) {
    const Reg value = grad_of(V::load(x + i));
    if constexpr (kStream) {
      V::stream(grad + i, value);
    } else {
      V::store(grad + i, value);
    }
  };
  const int64_t covered = for_vectors<V>(
      size,
      [&](int64_t i) __attribute__((always_inline)) {
        for (int u = 0; u < kUnroll; ++u) put(i + u * V::kWidth);
      },
      put);
  if (covered < size) {
    T padded[V::kWidth] = {};
    for (int64_t i = covered; i < size; ++i) padded[i - covered] = x[i];
    V::store(padded, grad_of(V::load(padded)));
    for (int64_t i = covered; i < size; ++i) grad[i] = padded[i - covered];
  }
}

// Pass 2: one read and one write of the row.
template <typename V, typename T, bool kCap>
MIXCE_INLINE void row_grad(const T* x, T* grad, int64_t vocab_size, int64_t target,
                           const GradTerms<typename V::Real>& terms, const Transform<typename V::Real>& transform,
                           const Exponent<V>& exponent, bool stream) {
  using Real = typename V::Real;
  // Before the write: the gradient may lie where the logits are.
  Real at_target = terms.t;
  if constexpr (kCap) at_target *= first_lane<V>(capped(V::set(to_real(x[target])), transform).slope);
  constexpr uintptr_t kAlignment = V::kWidth * sizeof(T);
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(grad) % kAlignment / sizeof(T));
  const int64_t head = misaligned == 0 ? 0 : V::kWidth - misaligned;
  int64_t begin = 0;
  while (begin < vocab_size) {
    int64_t size = begin == 0 && head > 0 ? head : kGradBlock;
    if (size > vocab_size - begin) size = vocab_size - begin;
    // An ordinary store to the target's line must not race with a streaming one.
    const bool holds_target = target >= begin && target < begin + size;
    if (stream && !holds_target) {
      grad_block<V, T, kCap, true>(x + begin, grad + begin, size, terms, transform, exponent);
    } else {
      grad_block<V, T, kCap, false>(x + begin, grad + begin, size, terms, transform, exponent);
    }
    begin += size;
  }
  from_real(at_target, grad + target);
}

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
template <typename T, bool kCap, bool kSmooth, bool kStats>
void forward_rows(const RowParams& p, const ForwardParams& f, int64_t begin, int64_t end) {
  using V = typename VectorFor<T>::Type;
  using Real = typename V::Real;
  const Transform<Real> transform = transform_of<Real>(p);
  const Exponent<V> exponent(transform.diff_scale);
  const LossOptions<double> options{p.label_smoothing, p.z_loss};
  Real* const loss = static_cast<Real*>(f.loss);
  Real* const state = static_cast<Real*>(p.state);
  Real* const stats_out = static_cast<Real*>(f.stats);

  for (int64_t row = begin; row < end; ++row) {
    const T* x = logits_row<T>(p, row);
    const int64_t target = p.target(row);
    if (target == p.ignore_index) {
      loss[row] = 0;
      for (int i = 0; i < 5; ++i) state[i * p.rows + row] = 0;
      if constexpr (kStats) {
        for (int i = 0; i < 5; ++i) stats_out[i * p.rows + row] = 0;
        f.correct[row] = false;
      }
      if (p.grad_logits != nullptr) memset(grad_row<T>(p, row), 0, p.vocab_size * sizeof(T));
      continue;
    }

    // Pass 1.
    const auto stats = row_stats<V, T, kCap, kSmooth, kStats>(x, p.vocab_size, transform, exponent);

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
    if constexpr (kStats) {
      const double entropy = s - stats.sums.sum_exp_shifted / stats.sums.sum_exp;
      const double stats_row[5] = {terms.nll, terms.q, terms.weight, terms.lse, entropy};
      for (int i = 0; i < 5; ++i) stats_out[i * p.rows + row] = static_cast<Real>(stats_row[i]);
      // The first of the largest: an equal one before the target beats it.
      bool correct = x_target == stats.raw_maximum && terms.nll == terms.nll;
      for (int64_t j = 0; correct && j < target; ++j) correct = to_real(x[j]) != x_target;
      f.correct[row] = correct;
    }

    // Pass 2.
    if (p.grad_logits != nullptr) {
      const Real grad_loss = static_cast<const Real*>(p.grad_loss)[row * p.grad_loss_stride];
      const auto grad = grad_terms<Real>(state + row, p.rows, grad_loss, p.logit_scale);
      row_grad<V, T, kCap>(x, grad_row<T>(p, row), p.vocab_size, target, grad, transform, exponent, p.stream);
    }
  }
}

// Rows [begin, end) of the gradient, from the state of the forward: pass 2 alone.
template <typename T, bool kCap>
void grad_rows(const RowParams& p, int64_t begin, int64_t end) {
  using V = typename VectorFor<T>::Type;
  using Real = typename V::Real;
  const Transform<Real> transform = transform_of<Real>(p);
  const Exponent<V> exponent(transform.diff_scale);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t target = p.target(row);
    if (target == p.ignore_index) {
      memset(grad_row<T>(p, row), 0, p.vocab_size * sizeof(T));
      continue;
    }
    const Real grad_loss = static_cast<const Real*>(p.grad_loss)[row * p.grad_loss_stride];
    const auto grad = grad_terms<Real>(static_cast<const Real*>(p.state) + row, p.rows, grad_loss, p.logit_scale);
    row_grad<V, T, kCap>(logits_row<T>(p, row), grad_row<T>(p, row), p.vocab_size, target, grad, transform, exponent,
                         p.stream);
  }
}

// Rows [begin, end) of the gradient times grad_loss, in place; a factor of 1 leaves a row alone.
template <typename T>
void scale_rows(const RowParams& p, int64_t begin, int64_t end) {
  using V = typename VectorFor<T>::Type;
  using Real = typename V::Real;
  for (int64_t row = begin; row < end; ++row) {
    const Real factor = static_cast<const Real*>(p.grad_loss)[row * p.grad_loss_stride];
    if (factor == 1) continue;
    T* grad = grad_row<T>(p, row);
    auto put = [&](int64_t i) { V::store(grad + i, V::mul(V::load(grad + i), V::set(factor))); };
    const int64_t covered = for_vectors<V>(
        p.vocab_size, [&](int64_t i) { for (int u = 0; u < kUnroll; ++u) put(i + u * V::kWidth); }, put);
    for (int64_t i = covered; i < p.vocab_size; ++i) from_real(to_real(grad[i]) * factor, grad + i);
  }
}

template <bool value>
struct Bool {
  static constexpr bool kValue = value;
};

template <typename T>
void forward_dispatch(const RowParams& p, const ForwardParams& f, int64_t begin, int64_t end) {
  auto with_cap = [&](auto cap) {
    auto with_smooth = [&](auto smooth) {
      constexpr bool kCap = decltype(cap)::kValue, kSmooth = decltype(smooth)::kValue;
      if (f.stats != nullptr) {
        forward_rows<T, kCap, kSmooth, true>(p, f, begin, end);
      } else {
        forward_rows<T, kCap, kSmooth, false>(p, f, begin, end);
      }
    };
    p.label_smoothing > 0 ? with_smooth(Bool<true>()) : with_smooth(Bool<false>());
  };
  p.softcap > 0 ? with_cap(Bool<true>()) : with_cap(Bool<false>());
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
