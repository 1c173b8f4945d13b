// Runs a grid on the CPU. The threads of a cluster's blocks are fibers of the calling OS thread, which
// switches where they wait for one another; clusters run one after another.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "fibers.h"
#include "types.h"

// What kernels know by these names: of the grid, and of the fiber that runs.
inline thread_local dim3 gridDim, blockDim;
inline thread_local uint3 blockIdx, threadIdx;

namespace cuda_on_cpu {

constexpr uint32_t kWarpSize = 32, kMaxThreads = 1024, kMaxBlocks = 16;
constexpr size_t kMaxSharedBytes = 4 * kPage;

// Where in the source a thread waits.
struct Site {
  const char* what;
  const char* file;
  int line;

  bool operator==(const Site& other) const {
    return what == other.what && file == other.file && line == other.line;
  }
  std::string text() const {
    const char* slash = strrchr(file, '/');
    return std::string(what) + " at " + (slash ? slash + 1 : file) + ":" + std::to_string(line);
  }
};

// An asynchronous copy of 16 bytes that has not happened yet.
struct Copy {
  void* to;
  const void* from;
  uint32_t group;
};

enum class ClusterBarrier { kOutside, kArrived, kWaiting, kComplete };

struct Thread {
  Context context;
  uint3 index;
  struct Block* block;
  struct Warp* warp;
  uint32_t lane;
  bool exited;
  ClusterBarrier cluster_barrier;
  const Site* site;          // where it waits
  uint32_t mask;             // of the warp operation where it waits, else 0
  uint32_t source;           // the lane whose value it gets there
  uint64_t value;            // what it brings there, then what it got
  uint32_t votes;            // which lanes brought a value other than 0
  uint32_t committed;        // groups of copies
  std::vector<Copy> copies;  // oldest first
};

struct Warp {
  uint32_t lanes, ready, waiting;  // sets of lanes: that exist, that may run, that wait at a warp operation
  Thread* threads;
};

struct Block {
  uint3 index;
  uint32_t rank, size, exited;
  uint32_t ready;  // set of warps
  uint32_t arrived, votes, result;
  const Site* barrier;  // where threads wait
  char* shared;
  Thread* threads;
  Warp warps[kMaxThreads / kWarpSize];
};

struct Launch {
  dim3 grid, block, cluster;
  size_t shared_bytes;
  bool device_has_clusters;
  const void* kernel;
  std::function<void()> thread_main;
};

// Global memory that kernels may touch; where there is none, all of it.
struct Ranges {
  std::mutex mutex;
  std::map<uintptr_t, size_t> bytes;
};
inline Ranges registered;

enum class Order { kForward, kReverse, kShuffled };

struct Engine {
  Launch launch;
  std::map<uintptr_t, size_t> ranges;
  Order order;
  std::mt19937 random;

  uint32_t blocks, ready;  // blocks of the cluster, and the set of those that may run
  uint32_t live;           // threads of the cluster
  uint32_t cluster_arrived, cluster_exited;
  Block block[kMaxBlocks];
  std::vector<Thread> threads;

  Stacks stacks;
  char* shared[kMaxBlocks] = {};  // kMaxSharedBytes and an inaccessible page
  bool closed[kMaxBlocks] = {};
  Context outside;
  sigjmp_buf after_fault;
  std::unique_ptr<char[]> signal_stack;
  stack_t previous_signal_stack = {};

  Engine();
  ~Engine();

  // A member of the set. The first or the last one let a warp run as far ahead of the others as it can.
  uint32_t pick(uint32_t set) {
    if (order == Order::kForward) return __builtin_ctz(set);
    if (order == Order::kReverse) return 31 - __builtin_clz(set);
    const uint32_t turn = random() & 31;
    return (__builtin_ctz(set >> turn | set << (-turn & 31)) + turn) & 31;
  }

  // Takes a thread that may run; null if there is none.
  Thread* next() {
    if (ready == 0) return nullptr;
    Block& from = block[pick(ready)];
    const uint32_t w = pick(from.ready);
    Warp& warp = from.warps[w];
    const uint32_t lane = pick(warp.ready);
    if ((warp.ready &= ~(1u << lane)) == 0) from.ready &= ~(1u << w);
    if (from.ready == 0) ready &= ~(1u << from.rank);
    return &warp.threads[lane];
  }

  void wake(Block& of, Warp& warp, uint32_t lanes) {
    warp.ready |= lanes;
    of.ready |= 1u << (&warp - of.warps);
    ready |= 1u << of.rank;
  }

  cudaError_t run(const Launch& what);
  void run_cluster(const dim3& corner);
  void start(Block& of, uint32_t rank, const dim3& corner);
};

inline thread_local Engine* engine = nullptr;
inline thread_local Thread* current = nullptr;  // the fiber that runs

inline void resume(Context& from, Thread& thread) {
  current = &thread;
  blockIdx = thread.block->index;
  threadIdx = thread.index;
  switch_context(from, thread.context);
}

}  // namespace cuda_on_cpu
