#include "cpu_backend.h"

#include <omp.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "../reduction.h"
#include "../rows.h"
#include "row_kernel_table.h"

namespace mixce {
namespace {

struct Isa {
  const char* name;
  bool supported;
  const RowKernels& (*kernels)();
};

#if defined(__x86_64__)
// GCC knows the name "f16c" from release 11 on.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

std::vector<Isa> all_isas() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return {{"avx512", avx512, row_kernels_avx512},
          {"avx2", avx2, row_kernels_avx2},
          {"baseline", true, row_kernels_baseline}};
#else
  return {{"baseline", true, row_kernels_baseline}};
#endif
}

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = all_isas();
  return all;
}

const RowKernels& kernels_of(const std::string& name) {
  for (const Isa& isa : isas()) {
    if (name == isa.name && isa.supported) return isa.kernels();
  }
  throw std::invalid_argument("this machine does not run the instruction set " + name);
}

// Memory of the calling thread that stays with it, so that no call pays for touching it first.
void* thread_scratch(size_t bytes) {
  static thread_local std::vector<char> scratch;
  if (scratch.size() < bytes) scratch.resize(bytes);
  return scratch.data();
}

// Calls work(begin, end) over all rows. Rows are handed out in small runs, since ignored ones cost nothing.
template <typename Work>
void parallel_rows(int64_t rows, const CpuLaunch& launch, Work work) {
  constexpr int64_t kRunsPerThread = 16;
  const int threads = static_cast<int>(std::clamp<int64_t>(rows, 1, std::max(launch.threads, 1)));
  const int64_t run = std::max<int64_t>(1, rows / (threads * kRunsPerThread));
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (int64_t begin = 0; begin < rows; begin += run) {
    work(begin, std::min(begin + run, rows));
    // Streaming stores are not ordered with others: the thread that goes on must see them.
    if (launch.streaming_stores) std::atomic_thread_fence(std::memory_order_seq_cst);
  }
}

// By one thread, in runs, so that the sum of many tokens stays accurate.
template <typename Real>
void reduce(const ReductionParams& r) {
  constexpr int64_t kRun = 512;
  Totals totals = {};
  for (int64_t begin = 0; begin < r.number; begin += kRun) {
    Totals part = {};
    const int64_t end = std::min(begin + kRun, r.number);
    for (int64_t token = begin; token < end; ++token) add_token<Real>(r, token, part);
    add_totals(totals, part);
  }
  const double divisor = divisor_of(r, totals);
  store_total<Real>(r, totals, divisor);
  if (!stores_tokens(r)) return;
  for (int64_t token = 0; token < r.number; ++token) store_token<Real>(r, token, divisor);
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) {
    if (isa.supported) names.push_back(isa.name);
  }
  return names;
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  if (__builtin_cpu_is("intel")) found.push_back("intel");
  // Leaf 7, as compilers do not all know the name.
  constexpr unsigned kAmxBf16 = 1u << 22;
  unsigned eax, ebx, ecx, edx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kAmxBf16)) found.push_back("amx_bf16");
#endif
  return found;
}

int64_t cpu_forward(const ForwardCall& call, const CpuLaunch& launch) {
  const RowParams& params = call.rows;
  ForwardParams results = call.results;
  ReductionParams reduction = call.reduction;
  const int64_t rows = params.logits_rows.number;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t target = target_at(params, row);
    if (target != params.options.ignore_index && (target < 0 || target >= params.vocab_size)) return row;
  }
  std::vector<double> losses;
  if (results.losses == nullptr) {
    losses.resize(rows);
    reduction.losses = results.losses = losses.data();
  }
  const auto kernel = kernels_of(launch.isa).forward[static_cast<int>(params.dtype)];
  const size_t bytes = params.grad_logits == nullptr ? 0 : scratch_bytes(params);
  parallel_rows(rows, launch, [&](int64_t begin, int64_t end) {
    kernel(params, results, launch.streaming_stores, bytes == 0 ? nullptr : thread_scratch(bytes), begin,
           end);
  });
  if (call.reduces) cpu_reduce(reduction);
  return -1;
}

void cpu_reduce(const ReductionParams& params) {
  params.dtype == DType::kFloat64 ? reduce<double>(params) : reduce<float>(params);
}

void cpu_logits_grad(const RowParams& params, const CpuLaunch& launch) {
  const auto kernel = kernels_of(launch.isa).logits_grad[static_cast<int>(params.dtype)];
  parallel_rows(params.logits_rows.number, launch,
                [&](int64_t begin, int64_t end) { kernel(params, launch.streaming_stores, begin, end); });
}

void cpu_scale_rows(const RowParams& params, const CpuLaunch& launch) {
  const auto kernel = kernels_of(launch.isa).scale_rows[static_cast<int>(params.dtype)];
  parallel_rows(params.logits_rows.number, launch,
                [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

}  // namespace mixce
