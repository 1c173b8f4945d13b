// Runs the clusters of a grid, one after another.
#pragma once

#include "rendezvous.h"

namespace cuda_on_cpu {

inline Engine::Engine() : signal_stack(new char[kPage]) {
  static std::once_flag installed;
  std::call_once(installed, install_signal_handler);
  stack_t stack = {};
  stack.ss_sp = signal_stack.get();
  stack.ss_size = kPage;
  sigaltstack(&stack, &previous_signal_stack);
}

inline Engine::~Engine() {
  sigaltstack(&previous_signal_stack, nullptr);
  for (char* memory : shared) {
    if (memory != nullptr) munmap(memory, kMaxSharedBytes + kPage);
  }
}

inline void thread_main() {
  engine->launch.thread_main();
  exit_thread();
}

inline void Engine::start(Block& of, uint32_t rank, const dim3& corner) {
  const dim3 &c = launch.cluster, &b = launch.block;
  of = {};
  of.index = {corner.x + rank % c.x, corner.y + rank / c.x % c.y, corner.z + rank / (c.x * c.y)};
  of.rank = rank;
  of.size = b.x * b.y * b.z;
  of.threads = &threads[rank * of.size];

  if (shared[rank] == nullptr) {
    shared[rank] = map_memory(kMaxSharedBytes + kPage);
    protect(shared[rank] + kMaxSharedBytes, kPage, false);
  }
  if (closed[rank]) protect(shared[rank], kMaxSharedBytes, true);
  closed[rank] = false;
  const size_t bytes = (launch.shared_bytes + 15) / 16 * 16;
  of.shared = shared[rank] + kMaxSharedBytes - bytes;
  memset(of.shared, 0xFF, bytes);  // NaN, whatever the type

  for (uint32_t i = 0; i < of.size; ++i) {
    Thread& thread = of.threads[i];
    Warp& warp = of.warps[i / kWarpSize];
    thread.index = {i % b.x, i / b.x % b.y, i / (b.x * b.y)};
    thread.block = &of;
    thread.warp = &warp;
    thread.lane = i % kWarpSize;
    thread.exited = false;
    thread.cluster_barrier = ClusterBarrier::kOutside;
    thread.mask = thread.committed = 0;
    thread.copies.clear();
    // Stacks that all began at the same offset in a page would share a few lines of the cache.
    const size_t offset = i % 64 * 64;
    prepare_context(thread.context, stacks[&thread - threads.data()], Stacks::kBytes - offset, thread_main);
    if (thread.lane == 0) warp.threads = &thread;
    warp.lanes |= 1u << thread.lane;
  }
  for (uint32_t i = 0; i * kWarpSize < of.size; ++i) wake(of, of.warps[i], of.warps[i].lanes);
}

inline void Engine::run_cluster(const dim3& corner) {
  ready = cluster_arrived = cluster_exited = 0;
  for (uint32_t rank = 0; rank < blocks; ++rank) start(block[rank], rank, corner);
  live = blocks * block[0].size;
  resume(outside, *next());
  current = nullptr;
}

inline cudaError_t Engine::run(const Launch& what) {
  const char* name = getenv("CUDA_ON_CPU_ORDER");
  const std::string wanted = name ? name : "forward";
  const std::string shuffled = "shuffled";
  if (wanted == "forward" || wanted == "reverse") {
    order = wanted == "forward" ? Order::kForward : Order::kReverse;
  } else if (wanted.compare(0, shuffled.size(), shuffled) == 0) {
    order = Order::kShuffled;
    random.seed(wanted.size() > shuffled.size() ? atoi(wanted.c_str() + shuffled.size() + 1) : 1);
  } else {
    return fail(cudaErrorInvalidValue,
                "CUDA_ON_CPU_ORDER is '" + wanted + "', not forward, reverse or shuffled:SEED");
  }
  {
    const std::lock_guard<std::mutex> hold(registered.mutex);
    ranges = registered.bytes;
  }
  launch = what;
  gridDim = launch.grid;
  blockDim = launch.block;
  const dim3 &c = launch.cluster, clusters(what.grid.x / c.x, what.grid.y / c.y, what.grid.z / c.z);
  blocks = c.x * c.y * c.z;
  threads.resize(std::max<size_t>(threads.size(), blocks * launch.block.x * launch.block.y * launch.block.z));

  std::vector<uint32_t> sequence(clusters.x * clusters.y * clusters.z);
  std::iota(sequence.begin(), sequence.end(), 0);
  if (order == Order::kReverse) std::reverse(sequence.begin(), sequence.end());
  if (order == Order::kShuffled) std::shuffle(sequence.begin(), sequence.end(), random);
  if (sigsetjmp(after_fault, 1) != 0) {
    current = nullptr;
    return explained;
  }
  for (uint32_t i : sequence) {
    run_cluster(
        {i % clusters.x * c.x, i / clusters.x % clusters.y * c.y, i / (clusters.x * clusters.y) * c.z});
  }
  return cudaSuccess;
}

// The grid on the calling OS thread.
inline cudaError_t run(const Launch& launch) {
  static thread_local const std::unique_ptr<Engine> of_this_thread(new Engine);
  engine = of_this_thread.get();
  return engine->run(launch);
}

}  // namespace cuda_on_cpu
