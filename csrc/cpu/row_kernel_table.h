// The row kernels of one instruction set, and those that this machine may choose from.
#pragma once

#include "../params.h"

namespace mixce {

// Each works on rows [begin, end); indexed by DType.
struct RowKernels {
  void (*forward[4])(const RowParams&, const ForwardParams&, int64_t begin, int64_t end);
  void (*logits_grad[4])(const RowParams&, int64_t begin, int64_t end);
  void (*scale_rows[4])(const RowParams&, int64_t begin, int64_t end);
};

const RowKernels& row_kernels_baseline();
#if defined(__x86_64__)
const RowKernels& row_kernels_avx2();
const RowKernels& row_kernels_avx512();
#endif

}  // namespace mixce
