// CUDA on the host under ThreadSanitizer, which is told what CUDA's memory model orders and nothing else: a race is
// reported wherever that does not order two accesses, however they happened to fall in this run.
//
// A block is a thread of the host, so that its shared memory is its own; a CUDA thread is a fiber of the sanitizer.
//
// - The start of a launch follows all before it, its end comes before all after it.
// - A barrier orders what the block's threads did before it and what they do after it.
// - A fence and a later atomic of the same thread are a release pattern; an atomic and a later fence are an acquire
//   pattern. The first synchronizes with the second where its atomic came before, at the same address. Atomics alone
//   order nothing. (Fences of CUDA are sequentially consistent, which orders a little more; no kernel relies on it.)
#pragma once

#include <sanitizer/tsan_interface.h>

#include <cassert>
#include <memory>
#include <source_location>
#include <string>
#include <string_view>
#include <thread>

#include "testing/cuda_on_host.h"

#define __shared__ static thread_local

namespace shim {

// Objects that the sanitizer's happens-before goes through: `__tsan_release` into them, `__tsan_acquire` from them.
using Order = char;

struct Thread {
  void* fiber = __tsan_create_fiber(0);
  unsigned int barriers = 0;
  Order* released = nullptr;  // by its last fence
  int atomics_acquired = 0;   // how many of the launch's atomics came before its last fence

  inline static thread_local void* scheduler;
  inline static thread_local Order launched, finished, barrier[2];

  SHIM_UNSEEN_BY_TSAN void enter(bool first) {
    __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
    if (!first) return;
    released = nullptr;
    atomics_acquired = 0;
    __tsan_acquire(&launched);
    // Newer runtimes share 255 clocks among all threads. A release makes sure that this one has a fresh one.
    __tsan_release(this);
  }

  SHIM_UNSEEN_BY_TSAN void leave(bool last) {
    if (last) __tsan_release(&finished);
    __tsan_switch_to_fiber(scheduler, __tsan_switch_to_fiber_no_sync);
  }
};

// All atomics and fences of a launch, in their order. Plain arrays: the sanitizer sees the insides of containers.
struct Atomic {
  const void* address;
  const Thread* thread;
  Order* released;  // by the thread's last fence before it, or null
};

inline constexpr int kMaxAtomics = 1024, kMaxFences = 2048;
inline Atomic atomics[kMaxAtomics];
inline int atomic_count = 0;
inline Order fences[kMaxFences];
inline int fence_count = 0;

// Not a mutex, whose order the sanitizer would take for one of the kernel's.
class Lock {
 public:
  SHIM_UNSEEN_BY_TSAN Lock() {
    while (__atomic_test_and_set(&locked_, __ATOMIC_ACQUIRE)) std::this_thread::yield();
  }
  SHIM_UNSEEN_BY_TSAN ~Lock() { __atomic_clear(&locked_, __ATOMIC_RELEASE); }

 private:
  inline static bool locked_ = false;
};

// FILE:LINE of a barrier or fence that orders nothing in this run; threads still wait there.
inline std::string_view disordered;

inline bool orders(const std::source_location& at) {
  const size_t colon = disordered.find(':');
  return std::to_string(at.line()) != disordered.substr(colon + 1) ||
         !std::string_view(at.file_name()).ends_with(disordered.substr(0, colon));
}

SHIM_UNSEEN_BY_TSAN inline void barrier(bool ordered) {
  Order* order = &Thread::barrier[Block<Thread>::thread().barriers++ % 2];
  if (ordered) __tsan_release(order);
  Block<Thread>::wait();
  if (ordered) __tsan_acquire(order);
}

SHIM_UNSEEN_BY_TSAN inline void fence() {
  Thread& thread = Block<Thread>::thread();
  const Lock lock;
  for (int mine = thread.atomics_acquired; mine < atomic_count; ++mine) {
    if (atomics[mine].thread != &thread) continue;
    for (int i = 0; i < mine; ++i) {
      if (atomics[i].address == atomics[mine].address && atomics[i].released) __tsan_acquire(atomics[i].released);
    }
  }
  thread.atomics_acquired = atomic_count;
  assert(fence_count < kMaxFences);
  thread.released = &fences[fence_count++];
  __tsan_release(thread.released);
}

// Seen by the sanitizer, as an atomic access that orders nothing.
__attribute__((noinline)) inline unsigned int relaxed_add(unsigned int* address, unsigned int value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

SHIM_UNSEEN_BY_TSAN inline unsigned int atomic_add(unsigned int* address, unsigned int value) {
  const Thread& thread = Block<Thread>::thread();
  const Lock lock;
  assert(atomic_count < kMaxAtomics);
  atomics[atomic_count++] = {address, &thread, thread.released};
  return relaxed_add(address, value);
}

SHIM_UNSEEN_BY_TSAN inline void run_block(Block<Thread>& block, unsigned int index, const std::function<void()>& body) {
  block_index.x = index;
  Thread::scheduler = __tsan_get_current_fiber();
  __tsan_release(&Thread::launched);
  block.run(body);
  __tsan_acquire(&Thread::finished);
}

// All blocks at once.
inline void launch(int blocks, size_t threads, const std::function<void()>& body) {
  // Kept: fibers of the sanitizer are expensive to make, and a new one may be taken for one that is gone.
  static std::vector<std::unique_ptr<Block<Thread>>> pool;
  while (pool.size() < static_cast<size_t>(blocks)) pool.push_back(std::make_unique<Block<Thread>>(threads));
  atomic_count = fence_count = 0;
  std::vector<std::thread> running;
  for (int i = 0; i < blocks; ++i) running.emplace_back([&body, i] { run_block(*pool[i], i, body); });
  for (std::thread& thread : running) thread.join();
}

}  // namespace shim

inline void __syncthreads(const std::source_location at = std::source_location::current()) {
  shim::barrier(shim::orders(at));
}
inline void __threadfence(const std::source_location at = std::source_location::current()) {
  if (shim::orders(at)) shim::fence();
}
inline unsigned int atomicAdd(unsigned int* address, unsigned int value) { return shim::atomic_add(address, value); }
