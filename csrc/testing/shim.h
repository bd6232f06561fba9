// CUDA on the host, as far as the column kernels go. It proves indexing, masks and reductions, never races: blocks run
// one after another, in an order that the tests choose.
#pragma once

#include <numeric>
#include <random>

#include "testing/cuda_on_host.h"

#define __shared__ static

namespace shim {

inline unsigned int block_order_seed = 0;

struct Thread {
  void enter(bool) {}
  void leave(bool) {}
};

// Blocks in an order of the tests' choosing: results must not depend on it.
inline void launch(int blocks, int threads, const std::function<void()>& body) {
  std::vector<unsigned int> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (block_order_seed != 0) std::shuffle(order.begin(), order.end(), std::mt19937(block_order_seed));
  Block<Thread> block(threads);
  for (unsigned int index : order) {
    block_index.x = index;
    block.run(body);
  }
}

}  // namespace shim

inline void __syncthreads() { shim::Block<shim::Thread>::wait(); }
inline void __threadfence() {}
inline unsigned int atomicAdd(unsigned int* address, unsigned int value) {
  const unsigned int old = *address;
  *address += value;
  return old;
}
