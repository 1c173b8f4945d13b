// The runtime API, as far as launchers use it, of a device that the environment names.
#pragma once

#include <tuple>

#include "grid.h"

typedef struct CUstream_st* cudaStream_t;

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock,
  cudaDevAttrMaxSharedMemoryPerBlock,
  cudaDevAttrWarpSize,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrL2CacheSize,
  cudaDevAttrMaxThreadsPerMultiProcessor,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrReservedSharedMemoryPerBlock,
  cudaDevAttrClusterLaunch,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
  cudaFuncAttributeNonPortableClusterSizeAllowed,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace cuda_on_cpu {

struct Device {
  const char* name;
  int major, minor, multiprocessors, l2_bytes, threads, shared_bytes;  // the last two per multiprocessor
};
constexpr int kReservedSharedBytes = 1024, kDefaultSharedBytes = 48 << 10;
constexpr Device kDevices[] = {
    {"sm_80", 8, 0, 108, 40 << 20, 2048, 164 << 10},     // A100
    {"sm_90", 9, 0, 132, 50 << 20, 2048, 228 << 10},     // H100
    {"sm_100", 10, 0, 148, 126 << 20, 2048, 228 << 10},  // B200
    {"sm_120", 12, 0, 170, 96 << 20, 1536, 100 << 10},   // RTX 5090
};

// Null, and an error, where the environment names a device that is not in the table.
inline const Device* device() {
  const char* wanted = getenv("CUDA_ON_CPU_DEVICE");
  for (const Device& device : kDevices) {
    if (strcmp(device.name, wanted ? wanted : "sm_90") == 0) return &device;
  }
  fail(cudaErrorInvalidDevice,
       "CUDA_ON_CPU_DEVICE is '" + std::string(wanted) + "', not sm_80, sm_90, sm_100 or sm_120");
  return nullptr;
}

// What cudaFuncSetAttribute has said of each kernel.
struct KernelAttributes {
  std::mutex mutex;
  std::map<std::pair<const void*, cudaFuncAttribute>, int> values;

  int get(const void* kernel, cudaFuncAttribute attribute, int otherwise) {
    const std::lock_guard<std::mutex> hold(mutex);
    const auto found = values.find({kernel, attribute});
    return found == values.end() ? otherwise : found->second;
  }
  void set(const void* kernel, cudaFuncAttribute attribute, int value) {
    const std::lock_guard<std::mutex> hold(mutex);
    values[{kernel, attribute}] = value;
  }
};
inline KernelAttributes kernel_attributes;

// The answer of a GPU to a launch that it cannot make, else that of the run.
inline cudaError_t check_and_run(Launch& launch) {
  const Device* on = device();
  if (on == nullptr) return last_error;
  const dim3 &g = launch.grid, &b = launch.block, &c = launch.cluster;
  const uint64_t threads = uint64_t{b.x} * b.y * b.z, blocks = uint64_t{c.x} * c.y * c.z;
  const auto text = [](uint64_t number) { return std::to_string(number); };
  if (threads == 0 || threads > kMaxThreads || b.z > 64) {
    return fail(cudaErrorInvalidConfiguration, "a block of " + text(threads) + " threads");
  }
  if (uint64_t{g.x} * g.y * g.z == 0 || g.x > INT32_MAX || g.y > 65535 || g.z > 65535) {
    return fail(cudaErrorInvalidConfiguration,
                "a grid of " + text(g.x) + " x " + text(g.y) + " x " + text(g.z) + " blocks");
  }
  const int allowed =
      kernel_attributes.get(launch.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kDefaultSharedBytes);
  if (launch.shared_bytes > static_cast<size_t>(allowed)) {
    return fail(cudaErrorInvalidValue, text(launch.shared_bytes) + " bytes of dynamic shared memory, " +
                                           text(allowed) + " are allowed for the kernel");
  }
  launch.device_has_clusters = on->major >= 9;
  if (blocks != 1 && !launch.device_has_clusters) {
    return fail(cudaErrorNotSupported, std::string(on->name) + " has no thread-block clusters");
  }
  const bool large =
      kernel_attributes.get(launch.kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 0) != 0;
  if (blocks == 0 || blocks > (large ? kMaxBlocks : 8)) {
    return fail(cudaErrorInvalidClusterSize, "a cluster of " + text(blocks) + " blocks");
  }
  if (g.x % c.x != 0 || g.y % c.y != 0 || g.z % c.z != 0) {
    return fail(cudaErrorInvalidClusterSize, "the cluster does not divide the grid");
  }
  return run(launch);
}

}  // namespace cuda_on_cpu

template <typename... Params, typename... Args>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                                      Args&&... args) {
  const std::tuple<Params...> params(static_cast<Args&&>(args)...);
  cuda_on_cpu::Launch launch = {};
  launch.grid = config->gridDim;
  launch.block = config->blockDim;
  launch.shared_bytes = config->dynamicSmemBytes;
  launch.kernel = reinterpret_cast<const void*>(kernel);
  launch.thread_main = [&params, kernel] { std::apply(kernel, params); };
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const auto& cluster = config->attrs[i].val.clusterDim;
    launch.cluster = dim3(cluster.x, cluster.y, cluster.z);
  }
  return cuda_on_cpu::check_and_run(launch);
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = cuda_on_cpu::last_error;
  cuda_on_cpu::last_error = cudaSuccess;
  return error;
}
inline cudaError_t cudaPeekAtLastError() { return cuda_on_cpu::last_error; }
// Of the last failure more than a GPU would say.
inline const char* cudaGetErrorString(cudaError_t error) {
  if (error != cudaSuccess && error == cuda_on_cpu::explained) return cuda_on_cpu::explanation.c_str();
  return cudaGetErrorName(error);
}

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int index) {
  return index == 0
             ? cudaSuccess
             : cuda_on_cpu::fail(cudaErrorInvalidDevice, "device " + std::to_string(index) + " of one");
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  if (cudaSetDevice(index) != cudaSuccess) return cudaErrorInvalidDevice;
  const cuda_on_cpu::Device* device = cuda_on_cpu::device();
  if (device == nullptr) return cudaErrorInvalidDevice;
  const auto answer = [&] {
    switch (attribute) {
      case cudaDevAttrMaxThreadsPerBlock:
        return static_cast<int>(cuda_on_cpu::kMaxThreads);
      case cudaDevAttrMaxSharedMemoryPerBlock:
        return cuda_on_cpu::kDefaultSharedBytes;
      case cudaDevAttrWarpSize:
        return static_cast<int>(cuda_on_cpu::kWarpSize);
      case cudaDevAttrMultiProcessorCount:
        return device->multiprocessors;
      case cudaDevAttrL2CacheSize:
        return device->l2_bytes;
      case cudaDevAttrMaxThreadsPerMultiProcessor:
        return device->threads;
      case cudaDevAttrComputeCapabilityMajor:
        return device->major;
      case cudaDevAttrComputeCapabilityMinor:
        return device->minor;
      case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
        return device->shared_bytes;
      case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        return device->shared_bytes - cuda_on_cpu::kReservedSharedBytes;
      case cudaDevAttrReservedSharedMemoryPerBlock:
        return cuda_on_cpu::kReservedSharedBytes;
      case cudaDevAttrClusterLaunch:
        return static_cast<int>(device->major >= 9);
    }
    return 0;
  };
  *value = answer();
  return cudaSuccess;
}

struct cudaFuncAttributes {
  int ptxVersion;
};

// CUDA_ON_CPU_CODE is the architecture that the code passes for, 80 for sm_80, by default the device's; 0:
// none.
template <typename T>
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, T*) {
  const cuda_on_cpu::Device* device = cuda_on_cpu::device();
  if (device == nullptr) return cudaErrorInvalidDevice;
  const char* code = getenv("CUDA_ON_CPU_CODE");
  attributes->ptxVersion = code == nullptr ? 10 * device->major + device->minor : atoi(code);
  return attributes->ptxVersion > 0
             ? cudaSuccess
             : cuda_on_cpu::fail(cudaErrorNoKernelImageForDevice, "no kernel image for the device");
}

template <typename T>
inline cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute attribute, int value) {
  const cuda_on_cpu::Device* device = cuda_on_cpu::device();
  if (device == nullptr) return cudaErrorInvalidDevice;
  const int most = device->shared_bytes - cuda_on_cpu::kReservedSharedBytes;
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && (value < 0 || value > most)) {
    return cuda_on_cpu::fail(cudaErrorInvalidValue, std::to_string(value) +
                                                        " bytes of dynamic shared memory, " + device->name +
                                                        " has " + std::to_string(most));
  }
  cuda_on_cpu::kernel_attributes.set(reinterpret_cast<const void*>(kernel), attribute, value);
  return cudaSuccess;
}

// Once anything is registered, the accesses of mixce::ptx to global memory must stay within what is.
extern "C" {
__attribute__((used, weak, visibility("default"))) void cuda_on_cpu_register(const void* address,
                                                                             size_t bytes) {
  const std::lock_guard<std::mutex> hold(cuda_on_cpu::registered.mutex);
  cuda_on_cpu::registered.bytes[reinterpret_cast<uintptr_t>(address)] = bytes;
}
__attribute__((used, weak, visibility("default"))) void cuda_on_cpu_unregister(const void* address) {
  const std::lock_guard<std::mutex> hold(cuda_on_cpu::registered.mutex);
  cuda_on_cpu::registered.bytes.erase(reinterpret_cast<uintptr_t>(address));
}
__attribute__((used, weak, visibility("default"))) void cuda_on_cpu_clear() {
  const std::lock_guard<std::mutex> hold(cuda_on_cpu::registered.mutex);
  cuda_on_cpu::registered.bytes.clear();
}
}
