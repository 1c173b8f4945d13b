// Runs the kernels of planted_faults.cuh. Prints for each: name, twin, error, how many numbers are wrong, a
// digest of all numbers, the error's text.
#include <stdio.h>

#include <thread>

#include "planted_faults.cuh"

constexpr size_t kNumbers = kThreads * kBlocks, kBytes = kNumbers * sizeof(float);

__global__ void copy(const float* in, float* out) { out[global_index()] = in[global_index()]; }

struct Setup {
  void (*kernel)(const float*, float*);
  unsigned cluster = 1, blocks = kBlocks, threads = kThreads;
  size_t shared_bytes = kThreads * sizeof(float);
  int asked_bytes = 0;
};
struct Case {
  const char* name;
  Setup correct, faulty;
};
#define TWINS(kernel, ...)                                                   \
  {                                                                          \
    #kernel, {kernel<false>, ##__VA_ARGS__}, { kernel<true>, ##__VA_ARGS__ } \
  }
const Case kCases[] = {
    TWINS(missing_barrier),
    TWINS(unwritten_shared),
    TWINS(early_exit),
    TWINS(barrier_in_branch),
    TWINS(barrier_for_one_lane),
    TWINS(lane_not_in_mask),
    TWINS(source_not_in_mask),
    TWINS(exited_lane),
    TWINS(mixed_warp_operations),
    TWINS(missing_copy_wait),
    TWINS(short_copy_wait),
    TWINS(missing_first_cluster_barrier, 2),
    TWINS(missing_last_cluster_barrier, 2),
    TWINS(no_such_rank, 2),
    TWINS(cluster_wait_alone, 2),
    TWINS(cluster_arrive_twice, 2),
    TWINS(load_out_of_range),
    TWINS(store_out_of_range),
    TWINS(load_misaligned),
    TWINS(store_misaligned),
    TWINS(copy_misaligned),
    TWINS(dereference_out_of_range),
    TWINS(dereference_misaligned),
    TWINS(shared_out_of_range),
    TWINS(array_out_of_bounds, 1, kBlocks, kThreads, 2 * kThreads * sizeof(float)),
    TWINS(stack_overflow),
    TWINS(trap),
    {"shared_memory_not_asked_for",
     {copy, 1, kBlocks, kThreads, 49 << 10, 49 << 10},
     {copy, 1, kBlocks, kThreads, 49 << 10, 48 << 10}},
    {"too_much_shared_memory_asked_for",
     {copy, 1, kBlocks, kThreads, 99 << 10, 99 << 10},
     {copy, 1, kBlocks, kThreads, 228 << 10, 228 << 10}},
    {"too_many_threads", {copy}, {copy, 1, kBlocks, 1025}},
    {"no_blocks", {copy}, {copy, 1, 0}},
    {"large_cluster", {copy, 8}, {copy, 16, 16}},
    {"indivisible_grid", {copy, 4}, {copy, 3}},
};

// Memory between inaccessible pages, so that it ends where the second one begins.
struct Buffer {
  char* pages = cuda_on_cpu::map_memory(3 * cuda_on_cpu::kPage);
  float* numbers = reinterpret_cast<float*>(pages + 2 * cuda_on_cpu::kPage - kBytes);

  Buffer() {
    cuda_on_cpu::protect(pages, cuda_on_cpu::kPage, false);
    cuda_on_cpu::protect(pages + 2 * cuda_on_cpu::kPage, cuda_on_cpu::kPage, false);
    cuda_on_cpu_register(numbers, kBytes);
  }
  ~Buffer() {
    cuda_on_cpu_unregister(numbers);
    munmap(pages, 3 * cuda_on_cpu::kPage);
  }
};

struct Report {
  cudaError_t error;
  unsigned wrong;
  uint64_t digest;
  std::string text;
};

cudaError_t launch(const Setup& setup, const float* in, float* out) {
  const void* kernel = reinterpret_cast<const void*>(setup.kernel);
  if (setup.asked_bytes != 0) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, setup.asked_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {setup.cluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(setup.blocks);
  config.blockDim = dim3(setup.threads);
  config.dynamicSmemBytes = setup.shared_bytes;
  config.attrs = &cluster;
  config.numAttrs = setup.cluster > 1;
  return cudaLaunchKernelEx(&config, setup.kernel, in, out);
}

Report run(const Setup& setup) {
  Buffer in, out;
  for (size_t i = 0; i < kNumbers; ++i) in.numbers[i] = static_cast<float>(i + 1);
  Report report = {launch(setup, in.numbers, out.numbers), 0, 0, ""};
  report.text = cudaGetErrorString(report.error);
  for (size_t i = 0; i < kNumbers; ++i) {
    report.wrong += out.numbers[i] != in.numbers[i];
    report.digest = report.digest * 31 + __float_as_uint(out.numbers[i]);
  }
  return report;
}

// Eight OS threads that launch at once, each its own order of faults. Returns how many reports were not as
// expected.
int run_at_once() {
  int surprises = 0;
  std::vector<std::thread> threads;
  for (int seed = 0; seed < 8; ++seed) {
    threads.emplace_back([seed, &surprises] {
      for (int i = 0; i < 200; ++i) {
        const bool faulty = (i * 5 + seed) % 3 == 0;
        const Report report = run({faulty ? early_exit<true> : missing_barrier<false>});
        const bool expected = faulty ? report.error == cudaErrorLaunchFailure
                                     : report.error == cudaSuccess && report.wrong == 0;
        __atomic_fetch_add(&surprises, !expected, __ATOMIC_RELAXED);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return surprises;
}

// Reads floats, and writes for each pair of them what the instructions make of it.
void convert() {
  float pair[2];
  while (fread(pair, sizeof pair, 1, stdin) == 1) {
    const uint32_t bf16 = ptx::pack_bf16x2(pair[0], pair[1]), f16 = ptx::pack_f16x2(pair[0], pair[1]);
    const uint32_t swapped_bf16 = ptx::pack_bf16x2(pair[1], pair[0]),
                   swapped_f16 = ptx::pack_f16x2(pair[1], pair[0]);
    const float2 unpacked = ptx::unpack_f16x2(f16);
    const uint32_t words[] = {bf16, f16, ptx::max_bf16x2(bf16, swapped_bf16),
                              ptx::max_f16x2(f16, swapped_f16)};
    const float numbers[] = {unpacked.x,
                             unpacked.y,
                             ptx::exp2_approx(pair[0]),
                             ptx::exp2_approx(pair[1]),
                             ptx::reciprocal_approx(pair[0]),
                             ptx::reciprocal_approx(pair[1])};
    fwrite(words, sizeof words, 1, stdout);
    fwrite(numbers, sizeof numbers, 1, stdout);
  }
}

int main(int count, char** arguments) {
  const std::string mode = count > 1 ? arguments[1] : "";
  if (mode == "at_once") return run_at_once();
  if (mode == "convert") {
    convert();
    return 0;
  }
  for (const Case& each : kCases) {
    for (const char* twin : {"correct", "faulty", "correct again"}) {
      const Report report = run(strcmp(twin, "faulty") == 0 ? each.faulty : each.correct);
      printf("%s\t%s\t%s\t%u\t%zx\t%s\n", each.name, twin, cudaGetErrorName(report.error), report.wrong,
             static_cast<size_t>(report.digest), report.text.c_str());
    }
  }
}
