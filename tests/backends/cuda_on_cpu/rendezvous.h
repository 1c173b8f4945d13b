// Where threads wait for one another.
#pragma once

#include "faults.h"

namespace cuda_on_cpu {

// Lets other threads run until one of them has woken this one.
inline void wait_at(const Site& site) {
  Thread& me = *current;
  me.site = &site;
  Thread* next = engine->next();
  if (next == nullptr) deadlock();
  if (next != &me) resume(me.context, *next);
}

// Returns for how many of the block's threads the predicate holds.
inline uint32_t block_barrier(const Site& site, bool predicate) {
  Block& block = *current->block;
  const auto diverges = [&](uint32_t threads, const std::string& what) {
    fault(cudaErrorLaunchFailure, "divergent barrier: a thread is in " + site.text() + ", " +
                                      std::to_string(threads) + " threads of its block " + what);
  };
  if (block.exited > 0) diverges(block.exited, "have exited");
  if (block.arrived > 0 && !(site == *block.barrier))
    diverges(block.arrived, "wait in " + block.barrier->text());
  block.barrier = &site;
  block.votes += predicate;
  if (++block.arrived == block.size) {
    block.result = block.votes;
    block.arrived = block.votes = 0;
    for (uint32_t i = 0; i * kWarpSize < block.size; ++i)
      engine->wake(block, block.warps[i], block.warps[i].lanes);
  }
  wait_at(site);
  return block.result;
}

// Brings a value to the lanes of the mask. Returns the thread, with the value of lane `source` in it.
inline const Thread& meet_warp(const Site& site, uint32_t mask, uint64_t value, uint32_t source) {
  Thread& me = *current;
  Warp& warp = *me.warp;
  for (uint32_t lane : {me.lane, source}) {
    if (mask >> lane & 1) continue;
    fault(cudaErrorLaunchFailure, site.text() + ": the mask " + hex(mask) + " lacks the lane " +
                                      (lane == me.lane ? "itself, " : "that is read, ") +
                                      std::to_string(lane));
  }
  me.site = &site, me.mask = mask, me.value = value, me.source = source;
  warp.waiting |= 1u << me.lane;
  bool complete = (warp.waiting & mask) == mask;
  for (uint32_t rest = mask; complete && rest != 0; rest &= rest - 1) {
    const Thread& other = warp.threads[__builtin_ctz(rest)];
    complete = other.mask == mask && *other.site == site;
  }
  if (complete) {
    uint64_t values[kWarpSize];
    uint32_t votes = 0;
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
      const uint32_t lane = __builtin_ctz(rest);
      values[lane] = warp.threads[lane].value;
      votes |= static_cast<uint32_t>(values[lane] != 0) << lane;
    }
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
      Thread& thread = warp.threads[__builtin_ctz(rest)];
      thread.value = values[thread.source];
      thread.votes = votes;
      thread.mask = 0;
    }
    warp.waiting &= ~mask;
    engine->wake(*me.block, warp, mask);
  }
  wait_at(site);
  return me;
}

// Threads that have exited count as arrived.
inline void count_at_cluster_barrier() {
  if (++engine->cluster_arrived < engine->blocks * engine->block[0].size) return;
  engine->cluster_arrived = engine->cluster_exited;
  for (uint32_t i = 0; i < engine->blocks * engine->block[0].size; ++i) {
    Thread& thread = engine->threads[i];
    if (thread.exited) continue;
    if (thread.cluster_barrier == ClusterBarrier::kWaiting)
      engine->wake(*thread.block, *thread.warp, 1u << thread.lane);
    thread.cluster_barrier = ClusterBarrier::kComplete;
  }
}

inline void arrive_at_cluster_barrier(const Site& site) {
  if (current->cluster_barrier != ClusterBarrier::kOutside) {
    fault(cudaErrorLaunchFailure, site.text() + ": arrives a second time without a wait between");
  }
  current->cluster_barrier = ClusterBarrier::kArrived;
  count_at_cluster_barrier();
}

inline void wait_at_cluster_barrier(const Site& site) {
  Thread& me = *current;
  if (me.cluster_barrier == ClusterBarrier::kOutside) {
    fault(cudaErrorLaunchFailure, site.text() + ": waits without having arrived");
  }
  if (me.cluster_barrier == ClusterBarrier::kArrived) {
    me.cluster_barrier = ClusterBarrier::kWaiting;
    wait_at(site);
  }
  me.cluster_barrier = ClusterBarrier::kOutside;
}

// The end of a thread. With the last one of a block its shared memory becomes inaccessible: in a cluster
// another block must not read it any more.
[[noreturn]] inline void exit_thread() {
  Thread& me = *current;
  Block& block = *me.block;
  if (block.arrived > 0) {
    fault(cudaErrorLaunchFailure, "divergent barrier: a thread exits, " + std::to_string(block.arrived) +
                                      " threads of its block wait in " + block.barrier->text());
  }
  me.exited = true;
  ++engine->cluster_exited;
  if (me.cluster_barrier != ClusterBarrier::kArrived) count_at_cluster_barrier();
  if (--engine->live == 0) switch_context(me.context, engine->outside);
  if (++block.exited == block.size) {
    protect(engine->shared[block.rank], kMaxSharedBytes, false);
    engine->closed[block.rank] = true;
  }
  Thread* next = engine->next();
  if (next == nullptr) deadlock();
  resume(me.context, *next);
  __builtin_unreachable();
}

}  // namespace cuda_on_cpu
