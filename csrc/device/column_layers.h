// What the GPU kernels of the column operators know of their layers, and how the work is cut into thread blocks.
// Free of torch, for host and device.
#pragma once

#include <cstdint>

#include "device/merge.h"

namespace moment_ops {

// Threads of a block lie over (rows, columns): lanes across the columns, groups of lanes down the rows.
inline constexpr int kThreadBits = 7;
inline constexpr int kThreads = 1 << kThreadBits;
// One block takes at most this many rows of its columns; more rows, more blocks, folded as a pairwise tree.
inline constexpr int kBlockRows = 512;
inline constexpr int kVectorBytes = 16;
// Rows that a thread has in flight at once, of one tensor.
inline constexpr int kReductionTile = 8;
inline constexpr int kElementwiseTile = 4;

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
  int32_t lane_bits;  // log2 of the lanes

  MOMENT_OPS_HOST_DEVICE int lanes() const { return 1 << lane_bits; }
  MOMENT_OPS_HOST_DEVICE int groups() const { return kThreads >> lane_bits; }

  MOMENT_OPS_HOST_DEVICE int64_t packed(int64_t column) const {
    return offset + (outer == 1 ? column : column % inner * outer + column / inner);
  }

  // The same for COUNT columns from `column` on, with one division.
  template <int COUNT>
  MOMENT_OPS_HOST_DEVICE void packed(int64_t column, int64_t (&at)[COUNT]) const {
    const int64_t along = outer == 1 ? columns : inner;
    int64_t position = outer == 1 ? 0 : column / inner, channel = column - position * along;
#pragma unroll
    for (int c = 0; c < COUNT; ++c) {
      at[c] = offset + channel * outer + position;
      if (++channel < along) continue;
      channel = 0;
      ++position;
    }
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

// Whether rows that begin at `pointer`, `row_stride` elements apart, can be read 16 bytes at a time.
inline bool allows_vectors(const void* pointer, int64_t row_stride, int64_t rows, int element_size) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0 &&
         (rows == 1 || row_stride * element_size % kVectorBytes == 0);
}

// Bytes that keep the memory busy while they are on their way (Little's law): 40 KB for each of an H200's
// multiprocessors, 4.8 TB/s times 1.1 us.
inline constexpr int64_t kBytesInFlight = 132 * 40 * 1024;
// A thread walks over more rows only where blocks have no more lanes than a warp: the last blocks of a launch work
// alone, and should not do so for long.
inline constexpr int kThreadRows = 32;
inline constexpr int kWarpBits = 5;
// Groups do not make lanes so few that a row is read in pieces of less than two sectors.
inline constexpr int kPieceBytes = 64;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a layer's threads have in flight where its rows are cut into chunks alone.
inline int64_t bytes_in_flight(const ColumnLayer& layer, int element_size, int tile_rows) {
  const int64_t rows = layer.rows < tile_rows ? layer.rows : tile_rows;
  return ceil_div(layer.rows, kBlockRows) * rows * layer.columns * element_size * (layer.grad != nullptr ? 2 : 1);
}

// The groups that all layers of a launch want, so that together they have enough in flight.
inline int wanted_groups(int64_t bytes_in_flight) {
  int groups = 1;
  while (groups < kThreads && groups * bytes_in_flight < kBytesInFlight) groups *= 2;
  return groups;
}

// The lanes of a layer's blocks. Groups that merge inside a block cost little; blocks that merge cost a ticket, so that
// rows are cut into chunks for numerics alone.
inline int choose_lane_bits(const ColumnLayer& layer, int element_size, int tile_rows, int wanted) {
  const int lane_bytes = layer.vectors ? kVectorBytes : element_size;
  const int rows = layer.rows < kBlockRows ? layer.rows : kBlockRows;
  int bits = kThreadBits;
  for (; bits > 0; --bits) {
    const int groups = kThreads >> bits;
    const int64_t half_bytes = static_cast<int64_t>(lane_bytes) << (bits - 1);  // of a row, by half of the lanes
    const bool half_is_idle = half_bytes >= layer.columns * element_size;
    const bool too_little_in_flight = groups < wanted && half_bytes >= kPieceBytes;
    const bool long_walk = groups * kThreadRows < rows && bits > kWarpBits;
    const bool tiles_left = groups * tile_rows < rows;
    if (!tiles_left || !(half_is_idle || too_little_in_flight || long_walk)) break;
  }
  return bits;
}

struct Plan {
  int32_t blocks = 0;
  int32_t strips = 0;
  int64_t partial_columns = 0;
};

// Cuts a layer into strips of columns and chunks of rows, a block each.
inline void cut_layer(ColumnLayer& layer, int element_size, int tile_rows, int wanted, Plan& plan) {
  layer.chunks = static_cast<int32_t>(ceil_div(layer.rows, kBlockRows));
  layer.lane_bits = choose_lane_bits(layer, element_size, tile_rows, wanted);
  const int width = layer.vectors ? kVectorBytes / element_size : 1;
  const auto strips = static_cast<int32_t>(ceil_div(layer.columns, static_cast<int64_t>(layer.lanes()) * width));
  layer.first_block = plan.blocks;
  layer.first_strip = plan.strips;
  layer.partial = plan.partial_columns;
  plan.blocks += strips * layer.chunks;
  plan.strips += strips;
  if (layer.chunks > 1) plan.partial_columns += layer.columns * layer.chunks;
}

// A launch of one layer.
inline Plan plan_layer(ColumnLayer& layer, int element_size, int tile_rows) {
  Plan plan;
  cut_layer(layer, element_size, tile_rows, wanted_groups(bytes_in_flight(layer, element_size, tile_rows)), plan);
  return plan;
}

}  // namespace moment_ops
