// CUDA on the host, as far as the column kernels go: one block at a time, its threads as fibers that give way at
// barriers. It proves indexing, masks and reductions, never races: blocks run one after another, in an order that the
// tests choose.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

namespace shim {

struct Index {
  unsigned int x;
};

inline Index thread_index, block_index;
inline unsigned int block_order_seed = 0;

class Block {
 public:
  Block(unsigned int threads, std::function<void()> body) : body_(std::move(body)), fibers_(threads) {
    for (Fiber& fiber : fibers_) fiber.stack.resize(kStackBytes);
  }

  // Runs every thread to its end; all threads that are not done must meet at the same barriers.
  void run() {
    current_ = this;
    for (Fiber& fiber : fibers_) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = &scheduler_;
      fiber.done = false;
      makecontext(&fiber.context, &Block::start, 0);
    }
    for (size_t running = fibers_.size(); running > 0;) {
      size_t waiting = 0;
      const size_t before = running;
      for (size_t i = 0; i < fibers_.size(); ++i) {
        if (fibers_[i].done) continue;
        active_ = i;
        thread_index.x = static_cast<unsigned int>(i);
        swapcontext(&scheduler_, &fibers_[i].context);
        if (fibers_[i].done) {
          --running;
        } else {
          ++waiting;
        }
      }
      if (waiting != 0 && waiting != before) throw std::runtime_error("a barrier that not all threads of the block reach");
    }
  }

  static void barrier() {
    Block* block = current_;
    const size_t mine = block->active_;
    swapcontext(&block->fibers_[mine].context, &block->scheduler_);
    thread_index.x = static_cast<unsigned int>(mine);
  }

 private:
  static constexpr size_t kStackBytes = 64 * 1024;

  struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done = true;
  };

  static void start() {
    Block* block = current_;
    block->body_();
    block->fibers_[block->active_].done = true;
  }

  inline static Block* current_ = nullptr;
  std::function<void()> body_;
  std::vector<Fiber> fibers_;
  ucontext_t scheduler_;
  size_t active_ = 0;
};

// Blocks in an order of the tests' choosing: results must not depend on it.
inline void launch(int blocks, int threads, std::function<void()> body) {
  std::vector<unsigned int> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (block_order_seed != 0) std::shuffle(order.begin(), order.end(), std::mt19937(block_order_seed));
  Block block(threads, std::move(body));
  for (unsigned int index : order) {
    block_index.x = index;
    block.run();
  }
}

}  // namespace shim

#define threadIdx shim::thread_index
#define blockIdx shim::block_index
#define MOMENT_OPS_STREAM int
#define MOMENT_OPS_UNWRAP(...) __VA_ARGS__
#define MOMENT_OPS_LAUNCH(kernel, blocks, threads, stream, ...) \
  shim::launch((blocks), (threads), [&] { (void)(stream); MOMENT_OPS_UNWRAP kernel(__VA_ARGS__); })

inline void __syncthreads() { shim::Block::barrier(); }
inline void __threadfence() {}
inline unsigned int atomicAdd(unsigned int* address, unsigned int value) {
  const unsigned int old = *address;
  *address += value;
  return old;
}
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
