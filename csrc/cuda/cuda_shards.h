// A split vocabulary on a GPU: three kernels, a thread a token. They throw as those of cuda_backend.h do.
#pragma once

#include "../shards.h"
#include "cuda_backend.h"

namespace mixce {

void cuda_localize_targets(const RowParams& params, const LocalTargets& to, const CudaLaunch& launch);
void cuda_write_message(const RowParams& params, const ForwardParams& forward, const ShardMessage& to,
                        const CudaLaunch& launch);
void cuda_merge_messages(const RowParams& params, const ForwardParams& forward, const Messages& messages,
                         const CudaLaunch& launch);

}  // namespace mixce
