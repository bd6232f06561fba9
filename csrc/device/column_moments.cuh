// The reduction over rows for a list of layers in one launch.
//
// A block owns a strip of columns and at most kBlockRows of its rows. Every column is shifted by the mean of its first
// rows; tiles of eight rows are reduced in registers and merged one after another; groups of threads, then blocks, are
// merged in double as trees of a fixed shape. Whoever finishes a strip last folds it: no float is ever added atomically,
// so results are the same bit for bit in every run.
#pragma once

#include "device/column_layers.h"
#include "device/vector.h"

namespace moment_ops {

inline constexpr int kTileRows = 8;

template <class A, int WIDTH>
struct Partial {
  A mean[WIDTH];
  A m2[WIDTH];
};

// Where a thread's rows come from: its columns of the features as they are. Another source may change values on their way
// (`value`) and keep them (`keep`), as a tap does.
template <class T, int WIDTH>
struct FeatureRows {
  const T* x;
  int64_t row_stride;

  __device__ __forceinline__ Vector<T, WIDTH> load(int row) const { return load_vector<WIDTH>(x + row * row_stride); }
  __device__ __forceinline__ Vector<T, WIDTH> value(const Vector<T, WIDTH>& raw) const { return raw; }
  __device__ __forceinline__ void keep(int, const Vector<T, WIDTH>&) const {}
};

// The mean of up to kTileRows rows, relative to the first of them: that of a constant column is the constant.
template <int WIDTH, class Rows, class A>
__device__ __forceinline__ void load_pivot(const Rows& source, int begin, int rows, A (&pivot)[WIDTH]) {
  const auto first = source.value(source.load(begin));
  A sum[WIDTH] = {};
#pragma unroll
  for (int r = 1; r < kTileRows; ++r) {
    if (r >= rows) break;
    const auto next = source.value(source.load(begin + r));
#pragma unroll
    for (int c = 0; c < WIDTH; ++c) sum[c] += load(next.values[c]) - load(first.values[c]);
  }
  const A share = A(1) / A(rows < kTileRows ? rows : kTileRows);
#pragma unroll
  for (int c = 0; c < WIDTH; ++c) pivot[c] = load(first.values[c]) + sum[c] * share;
}

// Rows [begin, end) of WIDTH columns; means relative to the pivot, which is set, too.
template <int WIDTH, class Rows, class A>
__device__ __forceinline__ Partial<A, WIDTH> reduce_rows(const Rows& source, int begin, int end, A (&pivot)[WIDTH]) {
  Partial<A, WIDTH> total = {};
  if (begin == end) return total;
  load_pivot<WIDTH>(source, begin, end - begin, pivot);
  int row = begin;
  for (; row + kTileRows <= end; row += kTileRows) {
    decltype(source.load(row)) raw[kTileRows];  // all loads in flight before the first is used
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) raw[r] = source.load(row + r);
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      raw[r] = source.value(raw[r]);
      source.keep(row + r, raw[r]);
    }
    const A count = A(row - begin);
    const A share = A(kTileRows) / (count + A(kTileRows));
    const MergeFactors<A> factors{share, count * share};
#pragma unroll
    for (int c = 0; c < WIDTH; ++c) {
      A mean = 0;
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) mean += load(raw[r].values[c]) - pivot[c];
      mean *= A(1) / A(kTileRows);
      A m2 = 0;
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        const A deviation = (load(raw[r].values[c]) - pivot[c]) - mean;
        m2 += deviation * deviation;
      }
      merge(total.mean[c], total.m2[c], mean, m2, factors);
    }
  }
  for (; row < end; ++row) {
    const auto raw = source.value(source.load(row));
    source.keep(row, raw);
    const A count = A(row - begin);
    const A share = A(1) / (count + A(1));
    const MergeFactors<A> factors{share, count * share};
#pragma unroll
    for (int c = 0; c < WIDTH; ++c) {
      merge(total.mean[c], total.m2[c], load(raw.values[c]) - pivot[c], A(0), factors);
    }
  }
  return total;
}

// Rows of a group of threads, or of a block, inside [0, total): the g-th of equal parts.
struct RowRange {
  int begin, end;
};

__device__ __forceinline__ RowRange part_of(RowRange rows, int size, int index) {
  const int begin = min(rows.begin + size * index, rows.end);
  return {begin, min(begin + size, rows.end)};
}

// Shared memory of a reduction: the absolute moments of the groups of a narrow block.
template <int WIDTH>
struct GroupMoments {
  double mean[kThreads * WIDTH];
  double m2[kThreads * WIDTH];
};

// Merges the groups of a narrow block; group 0 ends up with the block's moments.
template <int WIDTH>
__device__ __forceinline__ void merge_groups(Partial<double, WIDTH>& mine, RowRange rows, int group_rows, int lane,
                                             int group, int groups, double* mean, double* m2) {
  const auto at = [&](int g, int c) { return (g * kNarrowThreads + lane) * WIDTH + c; };
#pragma unroll
  for (int c = 0; c < WIDTH; ++c) {
    mean[at(group, c)] = mine.mean[c];
    m2[at(group, c)] = mine.m2[c];
  }
  for (int span = 1; span < groups; span *= 2) {
    __syncthreads();
    if (group % (2 * span) != 0) continue;
    const RowRange a = part_of(rows, group_rows * span, group / span);
    const RowRange b = part_of(rows, group_rows * span, group / span + 1);
    const MergeFactors<double> factors = merge_factors<double>(a.end - a.begin, b.end - b.begin);
#pragma unroll
    for (int c = 0; c < WIDTH; ++c) {
      merge(mean[at(group, c)], m2[at(group, c)], mean[at(group + span, c)], m2[at(group + span, c)], factors);
    }
  }
#pragma unroll
  for (int c = 0; c < WIDTH; ++c) {
    mine.mean[c] = mean[at(group, c)];
    mine.m2[c] = m2[at(group, c)];
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

// Folds the chunks of a strip as a tree, in place: chunk i takes in chunk i + span.
template <int WIDTH>
__device__ __forceinline__ void fold_chunks(const ColumnLayer& layer, int64_t column, bool active, int group, int groups,
                                            double* mean, double* m2) {
  for (int span = 1; span < layer.chunks; span *= 2) {
    for (int i = 2 * span * group; active && i + span < layer.chunks; i += 2 * span * groups) {
      const RowRange a = part_of({0, layer.rows}, kBlockRows * span, i / span);
      const RowRange b = part_of({0, layer.rows}, kBlockRows * span, i / span + 1);
      const MergeFactors<double> factors = merge_factors<double>(a.end - a.begin, b.end - b.begin);
      for (int c = 0; c < WIDTH; ++c) {
        const int64_t to = i * layer.columns + column + c;
        const int64_t from = (i + span) * layer.columns + column + c;
        // Around the L1 cache, which knows nothing of what other blocks wrote.
        double to_mean = __ldcg(mean + to), to_m2 = __ldcg(m2 + to);
        merge(to_mean, to_m2, __ldcg(mean + from), __ldcg(m2 + from), factors);
        __stcg(mean + to, to_mean);
        __stcg(m2 + to, to_m2);
      }
    }
    __syncthreads();
  }
}

// The columns that a thread holds after a reduction.
template <class A, int WIDTH>
struct Columns {
  bool complete;  // their moments are final, and this thread is the one to use them
  int64_t first;  // in memory order
  Partial<A, WIDTH> moments;  // means absolute
};

// One block's share of a strip; `strip_done` is set in all threads of the block that completed it. `rows_of(column)` is
// the source of a thread's rows.
template <int WIDTH, class A, class RowsOf>
__device__ __forceinline__ Columns<A, WIDTH> reduce_strip(const ColumnLayer& layer, int strip, int chunk,
                                                          Workspace workspace, GroupMoments<WIDTH>& shared,
                                                          bool& strip_done, const RowsOf& rows_of) {
  const int across = layer.narrow ? kNarrowThreads : kThreads;
  const int groups = kThreads / across;
  const int lane = static_cast<int>(threadIdx.x) % across;
  const int group = static_cast<int>(threadIdx.x) / across;
  const int64_t column = (static_cast<int64_t>(strip) * across + lane) * WIDTH;
  const bool active = column < layer.columns;
  const RowRange rows{chunk * kBlockRows, min((chunk + 1) * kBlockRows, layer.rows)};
  const int group_rows = ((rows.end - rows.begin + groups - 1) / groups + kTileRows - 1) / kTileRows * kTileRows;

  A pivot[WIDTH] = {};
  Partial<A, WIDTH> moments = {};
  if (active) {
    const RowRange mine = part_of(rows, group_rows, group);
    moments = reduce_rows<WIDTH>(rows_of(column), mine.begin, mine.end, pivot);
  }
  strip_done = true;
  if (groups == 1 && layer.chunks == 1) {
#pragma unroll
    for (int c = 0; c < WIDTH; ++c) moments.mean[c] += pivot[c];
    return {active, column, moments};
  }

  Partial<double, WIDTH> wide;
#pragma unroll
  for (int c = 0; c < WIDTH; ++c) {
    wide.mean[c] = static_cast<double>(pivot[c]) + static_cast<double>(moments.mean[c]);
    wide.m2[c] = static_cast<double>(moments.m2[c]);
  }
  if (groups > 1) merge_groups<WIDTH>(wide, rows, group_rows, lane, group, groups, shared.mean, shared.m2);
  if (layer.chunks > 1) {
    double* mean = workspace.partial + 2 * layer.partial;
    double* m2 = mean + layer.columns * layer.chunks;
    if (active && group == 0) {
#pragma unroll
      for (int c = 0; c < WIDTH; ++c) {
        mean[chunk * layer.columns + column + c] = wide.mean[c];
        m2[chunk * layer.columns + column + c] = wide.m2[c];
      }
    }
    strip_done = arrives_last(workspace.tickets + layer.first_strip + strip, layer.chunks);
    if (strip_done) fold_chunks<WIDTH>(layer, column, active, group, groups, mean, m2);
    if (strip_done && active) {
#pragma unroll
      for (int c = 0; c < WIDTH; ++c) {
        wide.mean[c] = __ldcg(mean + column + c);
        wide.m2[c] = __ldcg(m2 + column + c);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < WIDTH; ++c) {
    moments.mean[c] = static_cast<A>(wide.mean[c]);
    moments.m2[c] = static_cast<A>(wide.m2[c]);
  }
  return {strip_done && active && group == 0, column, moments};
}

template <int WIDTH, class T>
struct FeaturesOf {
  const ColumnLayer& layer;

  __device__ __forceinline__ FeatureRows<T, WIDTH> operator()(int64_t column) const {
    return {static_cast<const T*>(layer.x) + column, layer.row_stride};
  }
};

template <class A>
struct MomentsOutput {
  A* mean;
  A* var;  // or null
  int64_t correction;
};

// The variance's factor: NaN where there are no degrees of freedom, as in torch.
template <class A>
__device__ __forceinline__ A variance_scale(const ColumnLayer& layer, int64_t correction) {
  const int64_t freedom = layer.rows - correction;
  return freedom > 0 ? A(1) / A(freedom) : A(NAN);
}

template <int WIDTH, class A, class RowsOf>
__device__ __forceinline__ void moments_strip(const ColumnLayer& layer, int strip, int chunk, Workspace workspace,
                                              GroupMoments<WIDTH>& shared, const MomentsOutput<A>& out,
                                              const RowsOf& rows_of) {
  bool strip_done;
  const Columns<A, WIDTH> mine = reduce_strip<WIDTH, A>(layer, strip, chunk, workspace, shared, strip_done, rows_of);
  if (!mine.complete) return;
  const A scale = variance_scale<A>(layer, out.correction);
#pragma unroll
  for (int c = 0; c < WIDTH; ++c) {
    const int64_t packed = layer.packed(mine.first + c);
    out.mean[packed] = mine.moments.mean[c];
    if (out.var != nullptr) out.var[packed] = mine.moments.m2[c] * scale;
  }
}

// Four blocks to a multiprocessor hold enough loads in flight; asking for more would spill.
template <class T, class A>
__global__ void __launch_bounds__(kThreads, 4)
    moments_kernel(const __grid_constant__ ColumnLayers list, Workspace workspace, MomentsOutput<A> out) {
  constexpr int WIDTH = kVectorBytes / sizeof(T);
  __shared__ GroupMoments<WIDTH> shared;
  const ColumnLayer& layer = list.layers[find_layer(list, blockIdx.x)];
  const int block = static_cast<int>(blockIdx.x) - layer.first_block;
  const int strip = block / layer.chunks, chunk = block % layer.chunks;
  if (layer.vectors) {
    moments_strip<WIDTH>(layer, strip, chunk, workspace, shared, out, FeaturesOf<WIDTH, T>{layer});
  } else {
    moments_strip<1>(layer, strip, chunk, workspace, reinterpret_cast<GroupMoments<1>&>(shared), out,
                     FeaturesOf<1, T>{layer});
  }
}

}  // namespace moment_ops
