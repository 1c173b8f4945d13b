// The AVX-512 row kernels compiled for AVX2: stands in for csrc/cpu/row_kernels_avx512.cpp.
#define MIXCE_AVX512
#include "row_kernels.h"

const mixce::RowKernels& mixce::row_kernels_avx512() { return kRowKernels; }
