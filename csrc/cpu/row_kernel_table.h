// The row kernels of one instruction set, and those that this machine may choose from.
#pragma once

#include <stddef.h>

#include "../params.h"

namespace mixce {

constexpr int64_t kBlock = 2048;  // logits: 8 KiB of float32, a quarter of the smallest L1

// The exponentials of a row and the reference of each of its blocks.
inline size_t scratch_bytes(const RowParams& params) {
  const int64_t values = params.vocab_size + params.vocab_size / kBlock + 2;
  return values * (params.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float));
}

// Each works on rows [begin, end); indexed by DType. With `streaming_stores` the gradient is written past the
// caches. `scratch`, where given, holds scratch_bytes(params): pass 1 leaves its exponentials there for
// pass 2.
struct RowKernels {
  void (*forward[4])(const RowParams&, const ForwardParams&, bool streaming_stores, void* scratch,
                     int64_t begin, int64_t end);
  void (*logits_grad[4])(const RowParams&, bool streaming_stores, int64_t begin, int64_t end);
  void (*scale_rows[4])(const RowParams&, int64_t begin, int64_t end);
};

const RowKernels& row_kernels_baseline();
#if defined(__x86_64__)
const RowKernels& row_kernels_avx2();
const RowKernels& row_kernels_avx512();
#endif

}  // namespace mixce
