// CUDA's words for the host compiler, and a block of CUDA threads as fibers. What a barrier orders, what shared memory
// is, and how blocks follow each other is up to the shim that includes this.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

// Without effect where no sanitizer is asked for. What gcc means by its attribute is another one for clang, whose
// no_sanitize still records entry and exit, and a fiber may be left between these.
#if defined(__clang__)
#define SHIM_UNSEEN_BY_TSAN __attribute__((disable_sanitizer_instrumentation))
#else
#define SHIM_UNSEEN_BY_TSAN __attribute__((no_sanitize("thread")))
#endif

namespace shim {

// What the host side of an operator allocates: address and bytes.
inline std::function<void(uintptr_t, size_t)> on_allocation;

template <class T>
inline std::vector<T> allocate(size_t size, T value) {
  std::vector<T> memory(size, value);
  if (on_allocation) on_allocation(reinterpret_cast<uintptr_t>(memory.data()), size * sizeof(T));
  return memory;
}

struct Index {
  unsigned int x;
};

inline thread_local Index thread_index, block_index;

// The threads of a block take turns on one thread of the host, and give way at barriers. `Thread` is what a shim keeps
// for each of them; its `enter(first)` is called before every turn, its `leave(last)` after it.
template <class Thread>
class Block {
 public:
  explicit Block(size_t threads) : fibers_(threads) {
    for (Fiber& fiber : fibers_) fiber.stack.resize(kStackBytes);
  }

  // Runs every thread to its end; all threads that are not done must meet at the same barriers.
  SHIM_UNSEEN_BY_TSAN void run(const std::function<void()>& body) {
    current_ = this;
    body_ = &body;
    for (Fiber& fiber : fibers_) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = &scheduler_;
      fiber.done = false;
      makecontext(&fiber.context, &Block::start, 0);
    }
    bool first = true;
    for (size_t running = fibers_.size(); running > 0; first = false) {
      size_t waiting = 0;
      const size_t before = running;
      for (size_t i = 0; i < fibers_.size(); ++i) {
        if (fibers_[i].done) continue;
        active_ = i;
        thread_index.x = static_cast<unsigned int>(i);
        fibers_[i].thread.enter(first);
        swapcontext(&scheduler_, &fibers_[i].context);
        if (fibers_[i].done) {
          --running;
        } else {
          ++waiting;
        }
      }
      if (waiting != 0 && waiting != before) throw std::runtime_error("a barrier that not all threads of a block reach");
    }
  }

  // The running thread.
  SHIM_UNSEEN_BY_TSAN static Thread& thread() { return current_->fibers_[current_->active_].thread; }

  // Returns when all threads of the block are here.
  SHIM_UNSEEN_BY_TSAN static void wait() {
    Block* block = current_;
    const size_t mine = block->active_;
    block->fibers_[mine].thread.leave(false);
    swapcontext(&block->fibers_[mine].context, &block->scheduler_);
    thread_index.x = static_cast<unsigned int>(mine);
  }

 private:
  static constexpr size_t kStackBytes = 64 * 1024;

  struct Fiber {
    Thread thread;
    ucontext_t context;
    std::vector<char> stack;
    bool done = true;
  };

  SHIM_UNSEEN_BY_TSAN static void start() {
    (*current_->body_)();
    Fiber& fiber = current_->fibers_[current_->active_];
    fiber.done = true;
    fiber.thread.leave(true);
  }

  inline static thread_local Block* current_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  std::vector<Fiber> fibers_;
  ucontext_t scheduler_;
  size_t active_ = 0;
};

}  // namespace shim

#define threadIdx shim::thread_index
#define blockIdx shim::block_index
#define MOMENT_OPS_STREAM int
#define MOMENT_OPS_UNWRAP(...) __VA_ARGS__
#define MOMENT_OPS_LAUNCH(kernel, blocks, threads, stream, ...) \
  shim::launch((blocks), (threads), [&] { (void)(stream); MOMENT_OPS_UNWRAP kernel(__VA_ARGS__); })

template <class T>
inline T __ldcg(const T* address) {
  return *address;
}
template <class T>
inline void __stcg(T* address, T value) {
  *address = value;
}
using std::max;
using std::min;
