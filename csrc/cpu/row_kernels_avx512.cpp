// Row kernels for x86-64 with AVX-512 F, BW, DQ and VL.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define MIXCE_AVX512
// GCC 12 warns about its own intrinsics (https://gcc.gnu.org/PR105593, fixed in GCC 13).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "row_kernels.h"

const mixce::RowKernels& mixce::row_kernels_avx512() { return kRowKernels; }
#endif
