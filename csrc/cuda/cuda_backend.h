// The CUDA backend: launches the row kernels on a device and a stream. All functions throw std::runtime_error
// with CUDA's own words where a launch fails, and synchronise with nothing.
#pragma once

#include "../params.h"

namespace mixce {

// How the Python side has a kernel launched: see mixce_kernels/backends/cuda_launch.py.
struct CudaLaunch {
  int device;
  uintptr_t stream;  // a cudaStream_t
  int parts;         // blocks of a row
  int shared_bytes;  // of a block
  bool from_shared;  // pass 2 of a forward finds the row in shared memory
  void* partials;    // [N, parts] of partial_bytes(dtype), where the rows of a forward alone are split
};

struct CudaDevice {
  int arch;       // 90 for compute capability 9.0
  int code_arch;  // what the code was compiled for that runs there; 0: the build holds none
  int multiprocessors;
  int shared_per_block, shared_per_multiprocessor;  // bytes
};

CudaDevice cuda_device(int device);
// Bytes of shared memory that a block needs beside the row it holds, and of a partial of a row.
int cuda_state_bytes(DType dtype);
int cuda_partial_bytes(DType dtype);

// The reduction is a kernel of its own.
void cuda_forward(const ForwardCall& call, const CudaLaunch& launch);
// Of `launch` the device and the stream alone.
void cuda_reduce(const ReductionParams& params, const CudaLaunch& launch);
void cuda_logits_grad(const RowParams& params, const CudaLaunch& launch);
void cuda_scale_rows(const RowParams& params, const CudaLaunch& launch);

}  // namespace mixce
