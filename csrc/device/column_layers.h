// What the GPU kernels of the column operators know of their layers, and how the work is cut into thread blocks.
// Free of torch, for host and device.
#pragma once

#include <cstdint>

#include "device/merge.h"

namespace moment_ops {

// Threads of a block, and how they lie over (columns, rows): wide layers give every thread columns of its own, narrow
// ones deal the rows out to groups of threads.
inline constexpr int kThreads = 128;
inline constexpr int kNarrowThreads = 16;  // across columns
// One block reduces at most this many rows of its columns; more rows, more blocks, folded as a pairwise tree.
inline constexpr int kBlockRows = 512;
inline constexpr int kVectorBytes = 16;

struct ColumnLayer {
  const void* x;
  const void* grad;  // backward only: a gradient to add, or null
  void* out;         // backward only
  int64_t row_stride, grad_stride, out_stride;
  int64_t columns;
  int64_t offset;  // of the first column in the packed vectors
  int64_t partial;  // of the layer's partial moments in the workspace, in columns
  int32_t rows;
  int32_t inner, outer;  // memory order is (outer, inner), packed order (inner, outer)
  int32_t first_block;
  int32_t first_strip;
  int32_t chunks;  // blocks per strip
  int32_t vectors;  // 16-byte accesses are possible throughout
  int32_t narrow;

  MOMENT_OPS_HOST_DEVICE int64_t packed(int64_t column) const {
    return offset + (outer == 1 ? column : column % inner * outer + column / inner);
  }
};

// Kernel arguments are passed by value: no copy to the device, no pointer that a graph replay could find stale.
// 4 KB of arguments on every toolkit; CUDA 12.1 raised that to 32 KB, of which a fifth holds more layers than most
// networks have. More layers, more launches.
#if !defined(CUDART_VERSION) || CUDART_VERSION >= 12010
inline constexpr int kMaxLayers = 64;
#else
inline constexpr int kMaxLayers = 30;
#endif

struct ColumnLayers {
  int32_t count;
  int32_t strips;  // over all launches of the call
  ColumnLayer layers[kMaxLayers];
};

// The layer that a block works for: the last whose first block is not after it.
MOMENT_OPS_HOST_DEVICE int find_layer(const ColumnLayers& list, int block) {
  int low = 0;
  for (int high = list.count; high - low > 1;) {
    const int middle = (low + high) / 2;
    if (list.layers[middle].first_block <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Columns that one block covers.
MOMENT_OPS_HOST_DEVICE int64_t strip_columns(const ColumnLayer& layer, int element_size) {
  const int per_thread = layer.vectors ? kVectorBytes / element_size : 1;
  return static_cast<int64_t>(layer.narrow ? kNarrowThreads : kThreads) * per_thread;
}

// Whether rows that begin at `pointer`, `row_stride` elements apart, can be read 16 bytes at a time.
inline bool allows_vectors(const void* pointer, int64_t row_stride, int64_t rows, int element_size) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0 &&
         (rows == 1 || row_stride * element_size % kVectorBytes == 0);
}

struct Plan {
  int32_t blocks = 0;
  int32_t strips = 0;
  int64_t partial_columns = 0;
};

// Cuts a reduction: strips of columns, and chunks of at most kBlockRows rows.
inline void plan_reduction(ColumnLayer& layer, int element_size, Plan& plan) {
  layer.chunks = static_cast<int32_t>((static_cast<int64_t>(layer.rows) + kBlockRows - 1) / kBlockRows);
  const int per_thread = layer.vectors ? kVectorBytes / element_size : 1;
  layer.narrow = layer.columns < static_cast<int64_t>(kThreads) * per_thread && layer.rows > 8 ? 1 : 0;
  const int64_t width = strip_columns(layer, element_size);
  const auto strips = static_cast<int32_t>((layer.columns + width - 1) / width);
  layer.first_block = plan.blocks;
  layer.first_strip = plan.strips;
  layer.partial = plan.partial_columns;
  plan.blocks += strips * layer.chunks;
  plan.strips += strips;
  if (layer.chunks > 1) plan.partial_columns += layer.columns * layer.chunks;
}

// Rows that one block of an elementwise kernel walks over, re-using its columns' coefficients.
inline constexpr int kApplyRows = 64;

// Cuts an elementwise pass: strips of columns, and runs of kApplyRows rows.
inline void plan_elementwise(ColumnLayer& layer, int element_size, Plan& plan) {
  layer.chunks = static_cast<int32_t>((static_cast<int64_t>(layer.rows) + kApplyRows - 1) / kApplyRows);
  layer.narrow = 0;
  const int64_t width = strip_columns(layer, element_size);
  const auto strips = static_cast<int32_t>((layer.columns + width - 1) / width);
  layer.first_block = plan.blocks;
  plan.blocks += strips * layer.chunks;
}

}  // namespace moment_ops
