// The records of a call: plain pointers and sizes, filled in by name on the Python side (module.cpp).
#pragma once

#include <stdint.h>

namespace mixce {

// Eight bytes wide, as all that a kernel's parameters consist of. Logits are of the first four.
enum class DType : int64_t {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kFloat64 = 3,
  kInt32 = 4,
  kInt64 = 5
};

// Storage types of half precision: bits alone.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Where rows lie: row i begins at (i / inner) * outer_stride + (i % inner) * inner_stride, in elements. The
// twin of RowLayout in mixce_kernels/backends/layout.py.
struct RowLayout {
  int64_t inner, outer_stride, inner_stride, number;
};

// The options that change a token's own numbers. The twin of TokenOptions in mixce_kernels/options.py.
struct TokenOptions {
  int64_t ignore_index;
  double label_smoothing, z_loss;
  double softcap;  // 0: none
  double logit_scale;
};

// The order is the kernels': what they read together lies in one pair of words, aligned to 16 bytes.
struct RowParams {
  const void* logits;  // [N, V]
  RowLayout logits_rows;
  int64_t vocab_size;
  const void* targets;  // [N]
  bool targets_int64;
  DType dtype;
  TokenOptions options;

  void* grad_logits;  // [N, V], null where no gradient is wanted
  RowLayout grad_rows;
  void* state;  // [kStateWidth, N] or, in a forward that no gradient follows, null
  // The upstream gradient of a token is the product of these two.
  const void* grad_loss;  // [N], float64 for float64 logits, else float32; null: 1
  int64_t grad_loss_stride;
  const double* token_scale;  // [N], of the loss's reduction; null: 1
  int64_t token_scale_stride;

  // Of log-probabilities and entropies, of the type of arithmetic, as grad_loss.
  const void* temperature;  // [N]: exponents are divided by it, in a forward alone or a gradient; null: 1
  void* entropy_state;      // [kEntropyStateWidth, N], written by a forward with statistics; null: not wanted
  const void* grad_entropy;  // [N], the upstream gradient of the entropies; null: none
  int64_t grad_entropy_stride;
};

// What a token's weight is made from: eta + (1 - eta) * f. The twin of KINDS in mixce_kernels/weightings.py,
// which has the formulas of f and their sources.
enum class Weighting : int64_t {
  kProbability = 0,
  kPower = 1,
  kTaiLr = 2,
  kBand = 3,
  kFocal = 4,
  kVariance = 5,
  kEntropy = 6,
  kCollisionPower = 7,
  kGiven = 8  // f itself is the first parameter
};

// What a forward reads and writes beside the rows.
struct ForwardParams {
  const void* eta;  // [N] or null; float32 or float64 like grad_loss
  int64_t eta_stride;
  double eta_value;
  Weighting weighting;
  const void* parameters;  // [2, N] or null; of eta's type
  double first, second;    // read where they are null
  void* losses;            // [N]
  void* stats;             // [kStatsWidth, N] or null
  bool* correct;           // [N] or null
};

// How the losses of tokens become the loss: each times its weight, then added up and divided.
struct ReductionParams {
  const void*
      losses;  // [N], float64 for float64 logits, else float32; null where token_scale alone is wanted
  int64_t number;
  const void* targets;  // [N]
  bool targets_int64;
  DType dtype;  // of the logits
  int64_t ignore_index;
  bool sums, mean;      // "sum" and "mean" add up, "mean" divides
  const void* weights;  // [N]; null: 1
  int64_t weights_stride;
  DType weights_dtype;
  const void* num_items;  // what "mean" divides by; null: num_items_value
  DType num_items_dtype;
  double num_items_value;  // NaN: the weights of the tokens that are not ignored, added up
  void* loss;              // of the type of losses: a number or, unless `sums`, [N]; null: not wanted
  double* token_scale;     // a token's factor in the loss: a number or, with weights, [N]; null: not wanted
};

// All that a forward is told.
struct ForwardCall {
  RowParams rows;
  ForwardParams results;
  ReductionParams reduction;
  bool reduces;
};

}  // namespace mixce
