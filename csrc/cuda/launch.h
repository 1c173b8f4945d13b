// A kernel's launch, its checks included.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace mixce {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next caller would be told of it
  throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(error));
}

struct LaunchConfig {
  int64_t blocks;
  int threads;
  int cluster;  // blocks that form a cluster; 1: none
  int shared_bytes;
  cudaStream_t stream;
};

// Launches on the current device.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const LaunchConfig& config, const Args&... args) {
  if (config.blocks == 0) return;
  constexpr int kWithoutAsking = 48 * 1024;
  if (config.shared_bytes > kWithoutAsking) {
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, config.shared_bytes),
               "asking for shared memory");
  }
  cudaLaunchConfig_t launched = {};
  launched.gridDim = dim3(static_cast<unsigned>(config.blocks));
  launched.blockDim = dim3(config.threads);
  launched.dynamicSmemBytes = config.shared_bytes;
  launched.stream = config.stream;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = config.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  launched.attrs = &cluster;
  launched.numAttrs = config.cluster > 1 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&launched, kernel, args...), "the launch of a kernel");
}

}  // namespace mixce
