// The CPU backend: picks an instruction set at run time and spreads rows over threads.
#pragma once

#include <string>
#include <vector>

#include "../params.h"

namespace mixce {

// How the Python side has a call run: see mixce_kernels/backends/cpu.py.
struct CpuLaunch {
  std::string isa;
  int threads;
  bool streaming_stores;  // the gradient is written past the caches
};

// Instruction sets that this machine can run, best first.
std::vector<std::string> supported_isas();

// What the choice of a BLAS rests on: "intel" for its processors, "amx_bf16" for tiles of bfloat16.
std::vector<std::string> cpu_features();

// Losses of tokens that no result points to stay here. Returns the first row whose target is out of range,
// having written nothing, or -1.
int64_t cpu_forward(const ForwardCall& call, const CpuLaunch& launch);
void cpu_reduce(const ReductionParams& params);
void cpu_logits_grad(const RowParams& params, const CpuLaunch& launch);
void cpu_scale_rows(const RowParams& params, const CpuLaunch& launch);

}  // namespace mixce
