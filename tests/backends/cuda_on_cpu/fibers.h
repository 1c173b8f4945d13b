// Fibers: call stacks of their own, between which one OS thread switches.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <vector>

#if !defined(__x86_64__)
#define CUDA_ON_CPU_UCONTEXT
#endif
#ifdef CUDA_ON_CPU_UCONTEXT
#include <ucontext.h>
#endif

namespace cuda_on_cpu {

#ifdef CUDA_ON_CPU_UCONTEXT

struct Context {
  ucontext_t state;
};

inline void switch_context(Context& from, const Context& to) { swapcontext(&from.state, &to.state); }

inline void prepare_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = bytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

#else

struct Context {
  void** stack_pointer;
};

// noipa: the compiler would otherwise conclude from the empty body that no register changes.
__attribute__((naked, noinline, noipa)) inline void swap_stacks(void*** /*rdi: save*/, void** /*rsi: load*/) {
  asm("push %rbx\n push %rbp\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbp\n pop %rbx\n ret");
}

inline void switch_context(Context& from, const Context& to) {
  swap_stacks(&from.stack_pointer, to.stack_pointer);
}

inline void prepare_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // where entry would return to; it leaves the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  context.stack_pointer = top;
}

#endif

constexpr size_t kPage = 1 << 16;  // a multiple of every machine's

inline char* map_memory(size_t bytes) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) {
    perror("cuda_on_cpu: mmap");
    abort();
  }
  return static_cast<char*>(memory);
}

inline void protect(char* memory, size_t bytes, bool accessible) {
  if (mprotect(memory, bytes, accessible ? PROT_READ | PROT_WRITE : PROT_NONE) != 0) {
    perror("cuda_on_cpu: mprotect");
    abort();
  }
}

// Stacks kept from launch to launch, each with an inaccessible page below it.
class Stacks {
 public:
  static constexpr size_t kBytes = kPage;

  ~Stacks() {
    for (char* slab : slabs_) munmap(slab, kSlab * kStride);
  }

  char* operator[](size_t i) {
    while (i >= slabs_.size() * kSlab) {
      slabs_.push_back(map_memory(kSlab * kStride));
      for (size_t j = 0; j < kSlab; ++j) protect(slabs_.back() + j * kStride, kPage, false);
    }
    return slabs_[i / kSlab] + i % kSlab * kStride + kPage;
  }

 private:
  static constexpr size_t kStride = kPage + kBytes, kSlab = 256;
  std::vector<char*> slabs_;
};

}  // namespace cuda_on_cpu
