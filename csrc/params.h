// What a row kernel is told: plain pointers and strides, filled in by the Python side.
#pragma once

#include <stdint.h>

namespace mixce {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// Storage types of half precision: bits alone.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Row i begins at data + (i / inner) * outer_stride + (i % inner) * inner_stride, in elements.
struct RowLayout {
  int64_t inner, outer_stride, inner_stride;

  int64_t offset(int64_t row) const { return (row / inner) * outer_stride + (row % inner) * inner_stride; }
};

struct RowParams {
  const void* logits;  // [N, V]
  RowLayout logits_rows;
  const void* targets;  // [N]
  bool targets_int64;
  int64_t rows, vocab_size;
  DType dtype;
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap, logit_scale;  // softcap 0: none

  void* grad_logits;  // [N, V], null where no gradient is wanted
  RowLayout grad_rows;
  const void* grad_loss;  // [N], float64 for float64 logits, else float32
  int64_t grad_loss_stride;
  void* state;  // [5, N]: m, s, a, c, t
  int threads;
  bool stream;  // the gradient is written past the caches

  int64_t target(int64_t row) const {
    return targets_int64 ? static_cast<const int64_t*>(targets)[row]
                         : static_cast<const int32_t*>(targets)[row];
  }
};

// What the forward reads and writes beside.
struct ForwardParams {
  const void* eta;  // [N] or null; float32 or float64 like grad_loss
  int64_t eta_stride;
  double eta_value;
  void* loss;     // [N]
  void* stats;    // [5, N]: nll, q, weight, lse, entropy; or null
  bool* correct;  // [N] or null
};

}  // namespace mixce
