// The CPU backend: picks an instruction set at run time and spreads rows over threads.
#pragma once

#include <string>
#include <vector>

#include "../params.h"

namespace mixce {

// Instruction sets that this machine can run, best first.
std::vector<std::string> supported_isas();

// Each takes the instruction set by name. `forward` returns the first row whose target is out of range,
// having written nothing, or -1.
int64_t cpu_forward(const std::string& isa, const RowParams& params, const ForwardParams& forward);
void cpu_logits_grad(const std::string& isa, const RowParams& params);
void cpu_scale_rows(const std::string& isa, const RowParams& params);

}  // namespace mixce
