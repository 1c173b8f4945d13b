#include <algorithm>

#include "cuda_backend.h"
#include "launch.h"
#include "reduction.cuh"
#include "row_kernels.cuh"

namespace mixce {
namespace {

template <typename T>
struct TypeTag {
  using Type = T;
};

// Calls body with the tag of the logits' type.
template <typename Body>
auto with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::kBFloat16:
      return body(TypeTag<BFloat16>());
    case DType::kFloat16:
      return body(TypeTag<Half>());
    case DType::kFloat64:
      return body(TypeTag<double>());
    default:
      return body(TypeTag<float>());
  }
}

// Calls body with std::true_type or std::false_type.
template <typename Body>
void with_bool(bool value, Body body) {
  value ? body(std::true_type()) : body(std::false_type());
}

cudaStream_t stream_of(const CudaLaunch& launch) { return reinterpret_cast<cudaStream_t>(launch.stream); }

LaunchConfig config_of(const RowParams& params, const CudaLaunch& launch, int cluster, int shared_bytes) {
  check_cuda(cudaSetDevice(launch.device), "selecting the device");
  return {params.logits_rows.number * launch.parts, kThreads, cluster, shared_bytes, stream_of(launch)};
}

template <typename T, bool kCap, bool kMoments>
void forward(const RowParams& params, const ForwardParams& forward, const CudaLaunch& launch) {
  const Launch in_kernel{launch.parts, launch.partials};
  const bool alone = params.grad_logits == nullptr;
  const LaunchConfig config = config_of(params, launch, alone ? 1 : launch.parts, launch.shared_bytes);
  if (alone) {
    mixce::launch(forward_kernel<T, kCap, kMoments, Pass2::kNone>, config, params, forward, in_kernel);
    if (launch.parts > 1) {
      mixce::launch(merge_kernel<T, kCap, kMoments>,
                    {params.logits_rows.number, kWarpSize, 1, 0, config.stream}, params, forward, in_kernel);
    }
  } else if (launch.from_shared) {
    mixce::launch(forward_kernel<T, kCap, kMoments, Pass2::kFromShared>, config, params, forward, in_kernel);
  } else {
    mixce::launch(forward_kernel<T, kCap, kMoments, Pass2::kFromGlobal>, config, params, forward, in_kernel);
  }
}

// The architecture that the code was compiled for which runs on a device, 0 if the build holds none for it:
// PTX of an older architecture runs too, but without what came later.
int code_arch(int device, int device_arch) {
  int current = 0;
  check_cuda(cudaGetDevice(&current), "asking for the device");
  check_cuda(cudaSetDevice(device), "selecting the device");
  cudaFuncAttributes attributes = {};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, merge_kernel<float, false, false>);
  check_cuda(cudaSetDevice(current), "selecting the device");
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();
    return 0;
  }
  check_cuda(error, "asking for the kernels' architecture");
  int arch = std::min(device_arch, attributes.ptxVersion);
#ifdef __CUDA_ARCH_LIST__
  int newest = 0;
  for (const int compiled : {__CUDA_ARCH_LIST__}) {
    if (compiled / 10 <= device_arch) newest = std::max(newest, compiled / 10);
  }
  arch = std::min(arch, newest);
#endif
  return arch;
}

}  // namespace

CudaDevice cuda_device(int device) {
  auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, device), "asking for a property of the device");
    return value;
  };
  const int arch =
      10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  return {arch, code_arch(device, arch), attribute(cudaDevAttrMultiProcessorCount),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
}

int cuda_state_bytes(DType dtype) {
  return with_type(dtype, [](auto tag) {
    return static_cast<int>(sizeof(SharedState<typename Format<typename decltype(tag)::Type>::Real>));
  });
}

int cuda_partial_bytes(DType dtype) {
  return with_type(dtype, [](auto tag) {
    return static_cast<int>(sizeof(Partial<typename Format<typename decltype(tag)::Type>::Real>));
  });
}

void cuda_forward(const ForwardCall& call, const CudaLaunch& launch) {
  with_type(call.rows.dtype, [&](auto tag) {
    with_bool(has_softcap(call.rows.options), [&](auto cap) {
      with_bool(needs_moments(call.rows.options) || call.results.stats != nullptr, [&](auto moments) {
        forward<typename decltype(tag)::Type, cap.value, moments.value>(call.rows, call.results, launch);
      });
    });
  });
  if (call.reduces) cuda_reduce(call.reduction, launch);
}

void cuda_reduce(const ReductionParams& params, const CudaLaunch& launch) {
  check_cuda(cudaSetDevice(launch.device), "selecting the device");
  mixce::launch(params.dtype == DType::kFloat64 ? reduction_kernel<double> : reduction_kernel<float>,
                {1, kReductionThreads, 1, kReductionSharedBytes, stream_of(launch)}, params);
}

void cuda_logits_grad(const RowParams& params, const CudaLaunch& launch) {
  const LaunchConfig config = config_of(params, launch, 1, launch.shared_bytes);
  with_type(params.dtype, [&](auto tag) {
    with_bool(has_softcap(params.options), [&](auto cap) {
      with_bool(params.grad_entropy != nullptr, [&](auto entropy) {
        mixce::launch(logits_grad_kernel<typename decltype(tag)::Type, cap.value, entropy.value>, config,
                      params, Launch{launch.parts, nullptr});
      });
    });
  });
}

void cuda_scale_rows(const RowParams& params, const CudaLaunch& launch) {
  const LaunchConfig config = config_of(params, launch, 1, launch.shared_bytes);
  with_type(params.dtype, [&](auto tag) {
    mixce::launch(scale_rows_kernel<typename decltype(tag)::Type>, config, params,
                  Launch{launch.parts, nullptr});
  });
}

}  // namespace mixce
