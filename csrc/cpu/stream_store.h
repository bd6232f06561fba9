#pragma once

#include <cstdint>

namespace moment_ops::cpu {

// Outputs above this, about a last-level cache, are streamed.
inline constexpr int64_t kStreamBytes = 24 << 20;

// Copies past the caches: a gradient larger than the last-level cache is evicted before it is read, and an ordinary
// store would first fetch every line that it overwrites.
void stream_store(const void* from, void* to, int64_t bytes);

// Streamed stores are weakly ordered: other threads may read only after this.
void stream_fence();

}  // namespace moment_ops::cpu
