// What a thread of the column kernels is to do: its columns, and its rows.
#pragma once

#include "device/column_layers.h"

namespace moment_ops {

struct RowRange {
  int begin, end;
};

// The index-th part of `size` rows; the last parts may have fewer, or none.
__device__ __forceinline__ RowRange part_of(RowRange rows, int size, int index) {
  const int begin = min(rows.begin + size * index, rows.end);
  return {begin, min(begin + size, rows.end)};
}

// A block's chunk of a strip, and the part of one thread. Threads are numbered lane by lane, group after group.
struct ThreadShare {
  int strip, chunk;
  int64_t strip_column;  // the strip's first
  RowRange block_rows;
  int group_rows;  // whole tiles; the last groups may have fewer rows, or none
  int64_t column;  // the thread's first
  RowRange rows;   // the thread's; none where its columns are beyond the layer's
};

template <int WIDTH>
__device__ __forceinline__ ThreadShare thread_share(const ColumnLayer& layer, int tile_rows) {
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x) - layer.first_block;
  const int lane = thread & (layer.lanes() - 1), group = thread >> layer.lane_bits;
  ThreadShare share;
  share.strip = block / layer.chunks;
  share.chunk = block % layer.chunks;
  share.strip_column = static_cast<int64_t>(share.strip) * layer.lanes() * WIDTH;
  share.block_rows = part_of({0, layer.rows}, kBlockRows, share.chunk);
  const int tiles = (share.block_rows.end - share.block_rows.begin + tile_rows - 1) / tile_rows;
  share.group_rows = ((tiles - 1) >> (kThreadBits - layer.lane_bits)) * tile_rows + tile_rows;
  share.column = share.strip_column + lane * WIDTH;
  share.rows = part_of(share.block_rows, share.group_rows, share.column < layer.columns ? group : kThreads);
  return share;
}

}  // namespace moment_ops
