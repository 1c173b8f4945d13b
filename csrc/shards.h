// A vocabulary whose columns lie on several ranks: what a rank tells the others of its rows, and what the
// ranks' messages make of a row. Host and device, with internal linkage: see mixce_math.h.
//
// A message is a header of three integers (digest of the call, first column, number of columns), as wide as
// the numbers of type Real that follow: of all tokens one number after another, [numbers, N]. These are m,
// the largest logit (capped, before its scale); s = log sum exp(z - m); z_y - m, infinite where the rank does
// not hold the target; with label smoothing the mean of z - m; with statistics the entropy, negative unless
// the target is the first of the rank's largest logits, and the collision probability; and with a softcap
// too, which may make different logits equal, the largest before it.
#pragma once

#include "rows.h"

namespace mixce {

static constexpr int kHeader = 3;

// The columns of a rank.
struct Columns {
  int64_t start, number;
};

// Targets of the whole vocabulary, counted from a rank's first column.
struct LocalTargets {
  Columns columns;
  int64_t ignored;    // what stands for a target that is ignored
  int64_t elsewhere;  // and for one in other columns
  int64_t* local;     // [N], written
};

// What becomes of a rank's rows, whose results lie in RowParams and ForwardParams; not read without columns.
struct ShardMessage {
  Columns columns;
  int64_t digest;
  bool with_stats;
  const void* largest_state;  // [kStateWidth, N] of a forward without the softcap, where the message has that
  void* message;              // [kHeader + numbers * N], written
};

// All ranks' messages.
struct Messages {
  const void* messages;  // [ranks, length]
  int64_t ranks, length;
};

template <typename Real>
struct IntegerOf {
  using Type = int32_t;
};
template <>
struct IntegerOf<double> {
  using Type = int64_t;
};

MIXCE_INLINE bool holds(const Columns& columns, int64_t target) {
  return target >= columns.start && static_cast<uint64_t>(target) - static_cast<uint64_t>(columns.start) <
                                        static_cast<uint64_t>(columns.number);
}

template <typename Index>
MIXCE_INLINE void localize_target(const RowParams& p, const LocalTargets& to, Index row) {
  const int64_t target = target_at(p, row);
  const bool ignored = target == p.options.ignore_index;
  to.local[row] = ignored ? to.ignored : holds(to.columns, target) ? target - to.columns.start : to.elsewhere;
}

// The largest logit that a state [kStateWidth, N] of a forward tells. Some kernels' m is finite in a row of
// -inf; a NaN among its logits shows in s.
template <typename Real, typename Index>
MIXCE_INLINE Real largest_logit(const void* state, int64_t rows, Index row) {
  const Real infinity = static_cast<Real>(INFINITY);
  const Real* const of_row = static_cast<const Real*>(state) + row;
  return of_row[rows] == -infinity ? -infinity : of_row[0];
}

// A difference, 0 in a row of -inf, which has none.
template <typename Real>
MIXCE_INLINE Real difference_or_zero(Real a, Real b) {
  const Real difference = a - b;
  return difference == difference ? difference : 0;
}

template <typename Real>
MIXCE_INLINE void write_header(const ShardMessage& to) {
  using Integer = typename IntegerOf<Real>::Type;
  Integer* const header = static_cast<Integer*>(to.message);
  header[0] = static_cast<Integer>(to.digest);
  header[1] = static_cast<Integer>(to.columns.start);
  header[2] = static_cast<Integer>(to.columns.number);
}

// A token's numbers, from the results of the row kernels with eta = 1: the loss is nll, or with a smoothing
// of 1 what the mean is made from.
template <typename Real, typename Index>
MIXCE_INLINE void write_numbers(const RowParams& p, const ForwardParams& f, const ShardMessage& to,
                                Index row) {
  const int64_t rows = p.logits_rows.number;
  const bool smooth = needs_moments(p.options);
  const Real infinity = static_cast<Real>(INFINITY);
  Real m = -infinity, s = -infinity, d_target = infinity, mean_shifted = 0, entropy = 0, collision = 0,
       largest = -infinity;
  if (to.columns.number > 0) {
    const Real loss = static_cast<const Real*>(f.losses)[row];
    const Real* const stats = static_cast<const Real*>(f.stats) + row;
    m = largest_logit<Real>(p.state, rows, row);
    s = static_cast<const Real*>(p.state)[rows + row];
    if (holds(to.columns, target_at(p, row))) {
      d_target = difference_or_zero(s, smooth || to.with_stats ? stats[0] : loss);
    }
    if (smooth) mean_shifted = difference_or_zero(s, loss);
    if (to.with_stats) {
      entropy = copysign(stats[4 * rows], f.correct[row] ? Real{1} : Real{-1});
      collision = stats[5 * rows];
    }
    if (to.largest_state != nullptr) largest = largest_logit<Real>(to.largest_state, rows, row);
  }
  Real* number = static_cast<Real*>(to.message) + kHeader + row;
  auto write = [&](Real value) { *number = value, number += rows; };
  write(m), write(s), write(d_target);
  if (smooth) write(mean_shifted);
  if (to.with_stats) write(entropy), write(collision);
  if (to.with_stats && has_softcap(p.options)) write(largest);
}

// Number `which` of a rank's message about a row.
template <typename Real, typename Index>
MIXCE_INLINE double number_at(const Messages& messages, int64_t rank, int64_t rows, int which, Index row) {
  return static_cast<const Real*>(messages.messages)[rank * messages.length + kHeader + which * rows + row];
}

// The columns of a rank by its message.
template <typename Real>
MIXCE_INLINE Columns columns_of(const Messages& messages, int64_t rank) {
  using Integer = typename IntegerOf<Real>::Type;
  const Integer* const header = static_cast<const Integer*>(messages.messages) + rank * messages.length;
  return {header[1], header[2]};
}

// The ranks that hold a row's target.
template <typename Real, typename Index>
MIXCE_INLINE int64_t holders_of(const Messages& messages, int64_t rows, Index row) {
  int64_t holders = 0;
  for (int64_t rank = 0; rank < messages.ranks; ++rank) {
    holders += number_at<Real>(messages, rank, rows, 2, row) != INFINITY;
  }
  return holders;
}

// Loss, state and statistics of a row from all ranks' messages, NaN unless one rank holds its target. All
// arithmetic is float64, and the same on every rank.
template <typename Real, typename Index>
MIXCE_INLINE void merge_row(const RowParams& p, const ForwardParams& f, const Messages& messages, Index row) {
  if (target_at(p, row) == p.options.ignore_index) return store_ignored_row<Real>(p, f, row);
  const int64_t rows = p.logits_rows.number;
  const double scale = row_scale<Real>(p, row);
  const bool smooth = needs_moments(p.options), with_stats = f.stats != nullptr;
  const int entropy_at = 3 + smooth, collision_at = entropy_at + 1;
  const int largest_at = has_softcap(p.options) ? collision_at + 1 : 0;
  auto number = [&](int64_t rank, int which) { return number_at<Real>(messages, rank, rows, which, row); };

  double m = -INFINITY;
  for (int64_t rank = 0; rank < messages.ranks; ++rank) m = fmax(m, number(rank, 0));

  int64_t vocab_size = 0, holders = 0, start_of_holder = 0;
  double sum_exp = 0, d_target = 0, sum_shifted = 0, largest_of_holder = -INFINITY;
  bool first_of_largest = false;
  for (int64_t rank = 0; rank < messages.ranks; ++rank) {
    const Columns columns = columns_of<Real>(messages, rank);
    // -inf for a rank without a finite logit.
    const double shift = scale * (number(rank, 0) - m);
    sum_exp += exp(number(rank, 1) + shift);
    vocab_size += columns.number;
    if (smooth && columns.number > 0) sum_shifted += columns.number * (number(rank, 3) + shift);
    const double d = number(rank, 2);
    if (d == INFINITY) continue;
    ++holders;
    d_target += d + shift;
    if (with_stats) {
      start_of_holder = columns.start;
      largest_of_holder = number(rank, largest_at);
      first_of_largest = !signbit(number(rank, entropy_at));
    }
  }
  const double s = holders == 1 ? log(sum_exp) : NAN;
  RowSums sums = {s, d_target, smooth ? sum_shifted / vocab_size : 0, 0, 0};
  double entropy = 0;
  for (int64_t rank = 0; with_stats && rank < messages.ranks; ++rank) {
    const double log_share = number(rank, 1) + scale * (number(rank, 0) - m) - s;
    const double share = exp(log_share);
    if (share != 0) {
      entropy += share * (fabs(number(rank, entropy_at)) - log_share);
      sums.collision += share * share * number(rank, collision_at);
    }
    // An equal logit before the target's beats it.
    const double largest = number(rank, largest_at);
    const Columns columns = columns_of<Real>(messages, rank);
    const bool before = columns.number > 0 && columns.start < start_of_holder;
    first_of_largest &= !(largest > largest_of_holder || (largest == largest_of_holder && before));
  }
  sums.expected_shifted = s - entropy;
  const auto terms =
      token_terms<Real, double>(scale * m, sums, mixture_at<Real>(p, f, row), vocab_size, p.options);
  Real state[kStateWidth];
  fill_state(static_cast<Real>(m), s, terms, state);
  store_loss(p, f, row, terms.loss, state);
  if (with_stats) store_stats<Real>(p, f, row, terms, sums, first_of_largest);
}

}  // namespace mixce
