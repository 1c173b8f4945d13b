// Row kernels for any machine the compiler targets.
#include "row_kernels.h"

const mixce::RowKernels& mixce::row_kernels_baseline() { return kRowKernels; }
