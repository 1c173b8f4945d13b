// What a GPU answers with a fault, a hang or silence: here it ends the launch, with a text.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>
#include <signal.h>

#include "engine.h"

namespace cuda_on_cpu {

inline thread_local cudaError_t last_error = cudaSuccess;
inline thread_local cudaError_t explained = cudaSuccess;  // the error that the explanation belongs to
inline thread_local std::string explanation;

inline cudaError_t fail(cudaError_t error, const std::string& why) {
  explanation = why;
  return last_error = explained = error;
}

inline std::string hex(uintptr_t number) {
  char text[24];
  snprintf(text, sizeof text, "%#zx", static_cast<size_t>(number));
  return text;
}

inline std::string place(const Thread& thread) {
  const auto text = [](const uint3& i) {
    return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
  };
  return "block " + text(thread.block->index) + ", thread " + text(thread.index);
}

// The kernel's name where the linker knows it, else its place in the file, for addr2line.
inline std::string kernel_name(const void* kernel) {
  Dl_info info = {};
  dladdr(kernel, &info);
  if (info.dli_sname == nullptr || info.dli_saddr != kernel) {
    const char* file = info.dli_fname ? info.dli_fname : "?";
    return file +
           ("+" + hex(reinterpret_cast<uintptr_t>(kernel) - reinterpret_cast<uintptr_t>(info.dli_fbase)));
  }
  char* readable = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
  const std::string name = readable ? readable : info.dli_sname;
  free(readable);
  return name;
}

// Ends the launch; the fibers are abandoned where they are.
[[noreturn]] inline void fault(cudaError_t error, const std::string& what) {
  if (current == nullptr) {
    fprintf(stderr, "cuda_on_cpu: outside of any kernel: %s\n", what.c_str());
    abort();
  }
  fail(error, what + "; kernel " + kernel_name(engine->launch.kernel) + ", " + place(*current));
  siglongjmp(engine->after_fault, 1);
}

[[noreturn]] inline void deadlock() {
  struct Group {
    uint32_t threads;
    std::string first;
  };
  std::map<std::string, Group> groups;
  uint32_t exited = 0;
  for (uint32_t i = 0; i < engine->blocks * engine->block[0].size; ++i) {
    const Thread& thread = engine->threads[i];
    if (thread.exited) {
      ++exited;
      continue;
    }
    const std::string mask = thread.mask == 0 ? "" : " with mask " + hex(thread.mask);
    ++groups.insert({thread.site->text() + mask, {0, place(thread)}}).first->second.threads;
  }
  std::string text = "deadlock: " + std::to_string(exited) + " threads have exited";
  for (const auto& [where, group] : groups) {
    text += ", " + std::to_string(group.threads) + " wait in " + where + " (first: " + group.first + ")";
  }
  fault(cudaErrorLaunchFailure, text);
}

// An access to global memory by an instruction that needs it aligned.
inline void check_access(const char* what, const void* address, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  if (begin % bytes != 0)
    fault(cudaErrorMisalignedAddress, std::string(what) + ": misaligned address " + hex(begin));
  if (engine->ranges.empty()) return;
  auto range = engine->ranges.upper_bound(begin);
  if (range == engine->ranges.begin() || (--range, begin + bytes > range->first + range->second)) {
    fault(cudaErrorIllegalAddress,
          std::string(what) + ": address " + hex(begin) + " is out of range of global memory");
  }
}

// Memory that must be the block's own shared memory.
inline void check_shared(const char* what, const void* address, size_t bytes, size_t alignment) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  if (begin % alignment != 0)
    fault(cudaErrorMisalignedAddress, std::string(what) + ": misaligned address " + hex(begin));
  const size_t offset = begin - reinterpret_cast<uintptr_t>(current->block->shared);
  if (offset + bytes > engine->launch.shared_bytes) {
    fault(cudaErrorIllegalAddress,
          std::string(what) + ": address " + hex(begin) + " is out of range of shared memory");
  }
}

inline std::string describe_access(uintptr_t address) {
  for (uint32_t rank = 0; rank < kMaxBlocks; ++rank) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(engine->shared[rank]);
    if (begin == 0 || address < begin || address >= begin + kMaxSharedBytes + kPage) continue;
    if (address >= begin + kMaxSharedBytes)
      return "address " + hex(address) + " is out of range of shared memory";
    return "address " + hex(address) + " is in shared memory of a block that has exited, rank " +
           std::to_string(rank);
  }
  const uintptr_t stack = reinterpret_cast<uintptr_t>(engine->stacks[current - engine->threads.data()]);
  if (address < stack && address >= stack - kPage) return "stack overflow";
  return "address " + hex(address) + " is out of range";
}

inline struct sigaction previous_actions[NSIG];
constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};

inline void on_signal(int signal, siginfo_t* info, void*) {
  if (current == nullptr) {  // not ours: the instruction faults again, for whoever was here before
    sigaction(signal, &previous_actions[signal], nullptr);
    return;
  }
  const uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr);
  if (signal == SIGSEGV || signal == SIGBUS) fault(cudaErrorIllegalAddress, describe_access(address));
  fault(cudaErrorLaunchFailure, strsignal(signal));
}

inline void install_signal_handler() {
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  for (int signal : kSignals) sigaction(signal, &action, &previous_actions[signal]);
}

// What -fsanitize=alignment,bounds calls; every record of the sanitizer begins with the place in the source.
struct SanitizerRecord {
  const char* file;
  uint32_t line, column;
};
[[noreturn]] inline void sanitizer_fault(cudaError_t error, const char* what, void* record, void* operand) {
  const auto* where = static_cast<const SanitizerRecord*>(record);
  const std::string value = hex(reinterpret_cast<uintptr_t>(operand));
  fault(error, Site{what, where->file, static_cast<int>(where->line)}.text() + ": " + value);
}
}  // namespace cuda_on_cpu
extern "C" {
[[noreturn]] __attribute__((used, weak, visibility("hidden"))) void __ubsan_handle_type_mismatch_v1_abort(
    void* record, void* pointer) {
  cuda_on_cpu::sanitizer_fault(cudaErrorMisalignedAddress, "misaligned address", record, pointer);
}
[[noreturn]] __attribute__((used, weak, visibility("hidden"))) void __ubsan_handle_out_of_bounds_abort(
    void* record, void* index) {
  cuda_on_cpu::sanitizer_fault(cudaErrorIllegalAddress, "index out of bounds", record, index);
}
}
