// Row kernels for x86-64 with AVX-512 F, BW, DQ and VL.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define MIXCE_AVX512
#include "row_kernels.h"

const mixce::RowKernels& mixce::row_kernels_avx512() { return kRowKernels; }
#endif
