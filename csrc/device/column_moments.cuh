// The reduction over rows for a list of layers in one launch.
//
// A block owns a strip of columns and at most kBlockRows of its rows. Every thread shifts its columns by the mean of
// its first rows; tiles of eight rows are reduced in registers and merged one after another; groups of threads, then
// blocks, are merged in double as trees of a fixed shape. Whoever finishes a strip last folds it: no float is ever
// added atomically, so results are the same bit for bit in every run.
#pragma once

#include "device/range.h"
#include "device/thread_share.cuh"
#include "device/vector.h"

namespace moment_ops {

template <class A, int WIDTH>
struct Partial {
  A mean[WIDTH];
  A m2[WIDTH];
};

// Where a thread's rows come from: its columns of the features as they are. Another source may change values on their
// way (`value`) and keep them (`keep`), as a tap does.
template <class T, int WIDTH>
struct FeatureRows {
  const T* x;
  int64_t row_stride;

  __device__ __forceinline__ Vector<T, WIDTH> load(int row) const { return load_vector<WIDTH>(x + row * row_stride); }
  __device__ __forceinline__ Vector<T, WIDTH> value(const Vector<T, WIDTH>& raw) const { return raw; }
  __device__ __forceinline__ void keep(int, const Vector<T, WIDTH>&) const {}
};

// Merges a tile of at most kReductionTile rows into the `before` rows above it. The first tile is shifted by its first
// row, and its mean is the pivot of all others: that of a constant column is the constant.
template <int WIDTH, class Rows, class A>
__device__ __forceinline__ void reduce_tile(const Rows& source, int row, int rows, int before, A (&pivot)[WIDTH],
                                            Partial<A, WIDTH>& total) {
  decltype(source.load(row)) tile[kReductionTile];  // all loads in flight before the first is used
#pragma unroll
  for (int r = 0; r < kReductionTile; ++r) {
    if (r < rows) tile[r] = source.load(row + r);
  }
#pragma unroll
  for (int r = 0; r < kReductionTile; ++r) {
    if (r >= rows) continue;
    tile[r] = source.value(tile[r]);
    source.keep(row + r, tile[r]);
  }
  const A share = A(rows) / A(before + rows);
  const MergeFactors<A> factors{share, A(before) * share};
  const A row_share = A(1) / A(rows);
#pragma unroll
  for (int c = 0; c < WIDTH; ++c) {
    if (before == 0) pivot[c] = tile[0][c];
    A mean = 0;
#pragma unroll
    for (int r = 0; r < kReductionTile; ++r) mean += r < rows ? tile[r][c] - pivot[c] : A(0);
    mean *= row_share;
    A m2 = 0;
#pragma unroll
    for (int r = 0; r < kReductionTile; ++r) {
      const A deviation = r < rows ? (tile[r][c] - pivot[c]) - mean : A(0);
      m2 += deviation * deviation;
    }
    merge(total.mean[c], total.m2[c], mean, m2, factors);
    if (before == 0) {
      const A shift = pivot[c] + total.mean[c];
      total.mean[c] -= shift - pivot[c];
      pivot[c] = shift;
    }
  }
}

// Rows of WIDTH columns; means relative to the pivot, which is set, too.
template <int WIDTH, class Rows, class A>
__device__ __forceinline__ Partial<A, WIDTH> reduce_rows(const Rows& source, RowRange rows, A (&pivot)[WIDTH]) {
  Partial<A, WIDTH> total = {};
  int row = rows.begin;
  for (; row + kReductionTile <= rows.end; row += kReductionTile) {
    reduce_tile<WIDTH>(source, row, kReductionTile, row - rows.begin, pivot, total);
  }
  if (row < rows.end) reduce_tile<WIDTH>(source, row, rows.end - row, row - rows.begin, pivot, total);
  return total;
}

// Absolute moments in shared memory, group by group, on their way from the threads that read a column's rows to the one
// that uses the column: thread j takes columns j, j + kThreads ... of the strip, so that neighbours write neighbours.
template <int WIDTH>
struct BlockMoments {
  // A gap after every 16, or threads WIDTH columns apart would meet in a bank.
  static constexpr int kSize = kThreads * WIDTH + kThreads * WIDTH / 16;
  double mean[kSize];
  double m2[kSize];

  static __device__ __forceinline__ int at(int index) { return index + index / 16; }
};

// Merges the groups of a block; group 0 ends up with the block's moments.
template <int WIDTH>
__device__ __forceinline__ void merge_groups(const ColumnLayer& layer, const ThreadShare& share,
                                             BlockMoments<WIDTH>& moments) {
  for (int span = 1; span < layer.groups(); span *= 2) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kThreads * WIDTH / (2 * span); i += kThreads) {
      const int lane = i / WIDTH & (layer.lanes() - 1), pair = i / WIDTH >> layer.lane_bits;
      const RowRange a = part_of(share.block_rows, share.group_rows * span, 2 * pair);
      const RowRange b = part_of(share.block_rows, share.group_rows * span, 2 * pair + 1);
      const int thread = (2 * pair * span << layer.lane_bits) + lane, other = thread + (span << layer.lane_bits);
      const int to = moments.at(thread * WIDTH + i % WIDTH), from = moments.at(other * WIDTH + i % WIDTH);
      merge(moments.mean[to], moments.m2[to], moments.mean[from], moments.m2[from],
            merge_factors<double>(a.end - a.begin, b.end - b.begin));
    }
  }
}

// True in every thread of the block that arrives last of `expected`; what the others wrote before is visible to it.
// The thread that takes the ticket fences it on both sides; barriers extend that to its block.
__device__ __forceinline__ bool arrives_last(unsigned int* ticket, unsigned int expected) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1u) + 1u == expected;
    if (last) __threadfence();
  }
  __syncthreads();
  return last;
}

// Workspace of a reduction: partial moments of strips with several chunks, and one ticket per strip.
struct Workspace {
  double* partial;
  unsigned int* tickets;
};

// The columns of a strip after its reduction; `done` in all threads of the block that completed it.
struct StripColumns {
  bool done;
  int index;
  int64_t first;  // in memory order
  int count;
};

// Rows of the chunks [first, first + count) of a layer.
__device__ __forceinline__ int64_t rows_of_chunks(const ColumnLayer& layer, int64_t first, int64_t count) {
  const int64_t rows = layer.rows;
  return min(rows, (first + count) * kBlockRows) - min(rows, first * kBlockRows);
}

inline constexpr int kFoldChunks = 8;

// Folds the chunks of a strip as a pairwise tree, kFoldChunks at a time, in place; the last fold is to shared memory.
template <int WIDTH>
__device__ __forceinline__ void fold_chunks(const ColumnLayer& layer, StripColumns strip, double* mean, double* m2,
                                            BlockMoments<WIDTH>& moments) {
  for (int span = 1; span < layer.chunks; span *= kFoldChunks) {
    if (span > 1) __syncthreads();
    const int folds = (layer.chunks - 1) / (span * kFoldChunks) + 1;
    for (int i = static_cast<int>(threadIdx.x); i < folds * strip.count; i += kThreads) {
      const int first = i / strip.count * kFoldChunks;  // chunk, in spans
      const int64_t column = strip.first + i % strip.count;
      double fold_mean[kFoldChunks] = {}, fold_m2[kFoldChunks] = {};
#pragma unroll
      for (int k = 0; k < kFoldChunks; ++k) {
        const int64_t chunk = static_cast<int64_t>(first + k) * span;
        if (chunk >= layer.chunks) continue;
        // Around the L1 cache, which knows nothing of what other blocks wrote.
        fold_mean[k] = __ldcg(mean + chunk * layer.columns + column);
        fold_m2[k] = __ldcg(m2 + chunk * layer.columns + column);
      }
#pragma unroll
      for (int step = 1; step < kFoldChunks; step *= 2) {
#pragma unroll
        for (int k = 0; k < kFoldChunks; k += 2 * step) {
          const int64_t chunk = static_cast<int64_t>(first + k) * span, count = static_cast<int64_t>(step) * span;
          const int64_t rows = rows_of_chunks(layer, chunk, count), more = rows_of_chunks(layer, chunk + count, count);
          merge(fold_mean[k], fold_m2[k], fold_mean[k + step], fold_m2[k + step], merge_factors<double>(rows, more));
        }
      }
      if (folds == 1) {
        moments.mean[moments.at(i)] = fold_mean[0];
        moments.m2[moments.at(i)] = fold_m2[0];
      } else {
        __stcg(mean + static_cast<int64_t>(first) * span * layer.columns + column, fold_mean[0]);
        __stcg(m2 + static_cast<int64_t>(first) * span * layer.columns + column, fold_m2[0]);
      }
    }
  }
}

// Where the rows of a layer come from: `rows_of.rows<WIDTH>(column)` is what a thread reads of WIDTH columns.
template <class T>
struct FeaturesOf {
  const ColumnLayer& layer;

  template <int WIDTH>
  __device__ __forceinline__ FeatureRows<T, WIDTH> rows(int64_t column) const {
    return {static_cast<const T*>(layer.x) + column, layer.row_stride};
  }
};

// The moments of a thread's columns of a complete strip, from sums of squares to variances: NaN where there are no degrees
// of freedom, as in torch. Read again where something that is not finite came out, hardly ever.
template <class A, int WIDTH, class RowsOf>
__device__ __forceinline__ void finish_columns(const ColumnLayer& layer, const StripColumns& strip, int64_t correction,
                                               BlockMoments<WIDTH>& moments, const RowsOf& rows_of) {
  const int64_t freedom = layer.rows - correction;
  const A scale = freedom > 0 ? A(1) / A(freedom) : A(NAN);
#pragma unroll 1
  for (int j = static_cast<int>(threadIdx.x); j < strip.count; j += kThreads) {
    const int at = moments.at(j);
    A mean = static_cast<A>(moments.mean[at]), m2 = static_cast<A>(moments.m2[at]), var = m2 * scale;
    if (!(is_finite(mean) && is_finite(m2))) {
      const auto source = rows_of.template rows<1>(strip.first + j);
      const auto read = [&](int64_t row) { return source.value(source.load(static_cast<int>(row)))[0]; };
      wide_moments(read, layer.rows, correction, mean, var);
    }
    moments.mean[at] = static_cast<double>(mean);
    moments.m2[at] = static_cast<double>(var);
  }
}

// One block's share of a strip, whose means and variances the block that completes it finds in `moments`.
template <class A, int WIDTH, class RowsOf>
__device__ __forceinline__ StripColumns reduce_strip(const ColumnLayer& layer, Workspace workspace, int64_t correction,
                                                     BlockMoments<WIDTH>& moments, const RowsOf& rows_of) {
  const ThreadShare share = thread_share<WIDTH>(layer, kReductionTile);
  A pivot[WIDTH] = {};
  Partial<A, WIDTH> mine = {};
  if (share.rows.begin < share.rows.end) {
    mine = reduce_rows<WIDTH>(rows_of.template rows<WIDTH>(share.column), share.rows, pivot);
  }
#pragma unroll
  for (int c = 0; c < WIDTH; ++c) {
    const int at = moments.at(static_cast<int>(threadIdx.x) * WIDTH + c);
    moments.mean[at] = static_cast<double>(pivot[c]) + static_cast<double>(mine.mean[c]);
    moments.m2[at] = static_cast<double>(mine.m2[c]);
  }
  merge_groups(layer, share, moments);
  __syncthreads();

  const int64_t rest = layer.columns - share.strip_column, most = layer.lanes() * WIDTH;
  StripColumns strip{true, share.strip, share.strip_column, static_cast<int>(min(rest, most))};
  if (layer.chunks > 1) {
    double* mean = workspace.partial + 2 * layer.partial;
    double* m2 = mean + layer.columns * layer.chunks;
#pragma unroll 1
    for (int j = static_cast<int>(threadIdx.x); j < strip.count; j += kThreads) {
      mean[share.chunk * layer.columns + strip.first + j] = moments.mean[moments.at(j)];
      m2[share.chunk * layer.columns + strip.first + j] = moments.m2[moments.at(j)];
    }
    strip.done = arrives_last(workspace.tickets + layer.first_strip + strip.index, layer.chunks);
    if (strip.done) fold_chunks(layer, strip, mean, m2, moments);
  }
  if (strip.done) finish_columns<A>(layer, strip, correction, moments, rows_of);
  return strip;
}

template <class A>
struct MomentsOutput {
  A* mean;
  A* var;  // or null
  int64_t correction;
};

template <int WIDTH, class A, class RowsOf>
__device__ __forceinline__ void moments_strip(const ColumnLayer& layer, Workspace workspace,
                                              BlockMoments<WIDTH>& moments, const MomentsOutput<A>& out,
                                              const RowsOf& rows_of) {
  const StripColumns strip = reduce_strip<A>(layer, workspace, out.correction, moments, rows_of);
  if (!strip.done) return;
  for (int j = static_cast<int>(threadIdx.x); j < strip.count; j += kThreads) {
    const int64_t packed = layer.packed(strip.first + j);
    out.mean[packed] = static_cast<A>(moments.mean[moments.at(j)]);
    if (out.var != nullptr) out.var[packed] = static_cast<A>(moments.m2[moments.at(j)]);
  }
}

// Four blocks to a multiprocessor hold enough loads in flight; asking for more would spill.
template <class T, class A>
__global__ void __launch_bounds__(kThreads, 4)
    moments_kernel(const __grid_constant__ ColumnLayers list, Workspace workspace, MomentsOutput<A> out) {
  constexpr int WIDTH = kVectorBytes / sizeof(T);
  __shared__ BlockMoments<WIDTH> moments;
  const ColumnLayer& layer = list.layers[find_layer(list, blockIdx.x)];
  const FeaturesOf<T> features{layer};
  if (layer.vectors) {
    moments_strip(layer, workspace, moments, out, features);
  } else {
    moments_strip(layer, workspace, reinterpret_cast<BlockMoments<1>&>(moments), out, features);
  }
}

}  // namespace moment_ops
