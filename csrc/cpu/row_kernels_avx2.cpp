// Row kernels for x86-64 with AVX2, FMA and F16C.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define MIXCE_AVX2
#include "row_kernels.h"

const mixce::RowKernels& mixce::row_kernels_avx2() { return kRowKernels; }
#endif
