#include <ptx.cuh>

#include "cuda_shards.h"
#include "launch.h"

namespace mixce {

// Few, so that the tokens of a batch reach every multiprocessor: a thread waits for memory most of the time.
constexpr int kTokensPerBlock = 64;

__device__ __forceinline__ int64_t token_of_thread() {
  return static_cast<int64_t>(blockIdx.x) * kTokensPerBlock + threadIdx.x;
}

__global__ void __launch_bounds__(kTokensPerBlock)
    localize_targets_kernel(const RowParams row_params, const LocalTargets targets) {
  const RowParams p = ptx::read_at_entry(row_params);
  const LocalTargets to = ptx::read_at_entry(targets);
  const int64_t row = token_of_thread();
  if (row < p.logits_rows.number) localize_target(p, to, row);
}

template <typename Real>
__global__ void __launch_bounds__(kTokensPerBlock)
    write_message_kernel(const RowParams row_params, const ForwardParams forward_params,
                         const ShardMessage message) {
  const RowParams p = ptx::read_at_entry(row_params);
  const ForwardParams f = ptx::read_at_entry(forward_params);
  const ShardMessage to = ptx::read_at_entry(message);
  const int64_t row = token_of_thread();
  if (row == 0) write_header<Real>(to);
  if (row < p.logits_rows.number) write_numbers<Real>(p, f, to, row);
}

// One block a multiprocessor: asked for nothing, the compiler spills to fit more.
template <typename Real>
__global__ void __launch_bounds__(kTokensPerBlock, 1)
    merge_messages_kernel(const RowParams row_params, const ForwardParams forward_params,
                          const Messages of_ranks) {
  const RowParams p = ptx::read_at_entry(row_params);
  const ForwardParams f = ptx::read_at_entry(forward_params);
  const Messages messages = ptx::read_at_entry(of_ranks);
  const int64_t row = token_of_thread();
  if (row < p.logits_rows.number) merge_row<Real>(p, f, messages, row);
}

namespace {

LaunchConfig config_of(int64_t tokens, const CudaLaunch& launch) {
  check_cuda(cudaSetDevice(launch.device), "selecting the device");
  return {(tokens + kTokensPerBlock - 1) / kTokensPerBlock, kTokensPerBlock, 1, 0,
          reinterpret_cast<cudaStream_t>(launch.stream)};
}

}  // namespace

void cuda_localize_targets(const RowParams& params, const LocalTargets& to, const CudaLaunch& launch) {
  mixce::launch(localize_targets_kernel, config_of(params.logits_rows.number, launch), params, to);
}

void cuda_write_message(const RowParams& params, const ForwardParams& forward, const ShardMessage& to,
                        const CudaLaunch& launch) {
  const auto kernel =
      params.dtype == DType::kFloat64 ? write_message_kernel<double> : write_message_kernel<float>;
  // Without a token there is a header.
  const int64_t threads = params.logits_rows.number > 0 ? params.logits_rows.number : 1;
  mixce::launch(kernel, config_of(threads, launch), params, forward, to);
}

void cuda_merge_messages(const RowParams& params, const ForwardParams& forward, const Messages& messages,
                         const CudaLaunch& launch) {
  const auto kernel =
      params.dtype == DType::kFloat64 ? merge_messages_kernel<double> : merge_messages_kernel<float>;
  mixce::launch(kernel, config_of(params.logits_rows.number, launch), params, forward, messages);
}

}  // namespace mixce
