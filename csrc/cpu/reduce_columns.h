// The reduction over rows of a list of layers, dealt out to threads; what becomes of the moments is the caller's.
//
// The work is cut by shapes alone and every piece has a place of its own to write to, so that results are the same
// bit for bit whatever the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "cpu/clones.h"
#include "cpu/column_moments.h"
#include "cpu/packed_order.h"
#include "layer.h"

namespace moment_ops::cpu {

// Wide strips keep the hardware prefetchers on eight long streams; their accumulators stay in the L2 cache.
inline constexpr int64_t kStripBytes = 64 * 1024;
// A layer with fewer strips than this is cut along its rows too.
inline constexpr int64_t kPieces = 32;
inline constexpr int64_t kPieceElements = 64 * 1024;

// Calls body(piece, worker) for every piece; the pieces are handed out as the workers get free.
template <class Body>
inline void for_each_piece(int64_t pieces, int64_t workers, Body body) {
  workers = std::min<int64_t>({workers, pieces, static_cast<int64_t>(torch::stable::get_num_threads())});
  if (workers <= 1) {
    for (int64_t piece = 0; piece < pieces; ++piece) body(piece, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t piece = next++; piece < pieces; piece = next++) body(piece, worker);
    }
  });
}

inline int64_t workers_for(int64_t elements) { return std::max<int64_t>(1, elements / 16384); }

struct Strip {
  int64_t layer;
  int64_t begin, end;  // columns, in memory order
  int64_t chunks, chunk_rows;
  int64_t partial;  // where the chunks' moments go, in columns
};

// Cuts layers into strips of columns, and strips of few columns and many rows into chunks of rows.
template <class A>
inline std::vector<Strip> make_strips(const std::vector<Layer>& layers, int64_t strip_bytes = kStripBytes) {
  const int64_t strip_columns = strip_bytes / static_cast<int64_t>(sizeof(A));
  std::vector<Strip> strips;
  int64_t partial = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    const int64_t layer_strips = (layer.columns + strip_columns - 1) / strip_columns;
    const int64_t width = std::min(strip_columns, layer.columns);
    int64_t chunk_rows = kBlockRows;
    while ((layer.rows + chunk_rows - 1) / chunk_rows * layer_strips > kPieces || chunk_rows * width < kPieceElements) {
      if (chunk_rows >= layer.rows) break;
      chunk_rows *= 2;
    }
    const int64_t chunks = std::max<int64_t>(1, (layer.rows + chunk_rows - 1) / chunk_rows);
    for (int64_t begin = 0; begin < layer.columns; begin += strip_columns) {
      const int64_t end = std::min(begin + strip_columns, layer.columns);
      strips.push_back({static_cast<int64_t>(i), begin, end, chunks, chunk_rows, partial});
      if (chunks > 1) partial += 2 * chunks * (end - begin);
    }
  }
  return strips;
}

// The inner loops, per feature dtype and x86-64 level.
template <class T>
struct ColumnLoops;

#define MOMENT_OPS_COLUMN_LOOPS(T)                                                                                 \
  template <>                                                                                                      \
  struct ColumnLoops<T> {                                                                                          \
    using A = accumulate_t<T>;                                                                                     \
    MOMENT_OPS_CLONES static void block(const T* x, int64_t row_stride, int64_t rows, int64_t columns, A* pivot,   \
                                        A* mean, A* m2) {                                                          \
      const auto tile_at = [=](int64_t row) {                                                                      \
        const T* tile = x + row * row_stride;                                                                      \
        return [=](int r, int64_t column) { return load(tile[r * row_stride + column]); };                         \
      };                                                                                                           \
      block_moments<8>(tile_at, rows, columns, pivot, mean, m2);                                                   \
    }                                                                                                              \
    MOMENT_OPS_CLONES static bool finish(StripMoments<A>& moments, int64_t columns, int64_t rows,                  \
                                         int64_t correction) {                                                     \
      return moments.finish(columns, rows, correction);                                                            \
    }                                                                                                              \
  };
MOMENT_OPS_COLUMN_LOOPS(double)
MOMENT_OPS_COLUMN_LOOPS(float)
MOMENT_OPS_COLUMN_LOOPS(Half)
MOMENT_OPS_COLUMN_LOOPS(BFloat16)
#undef MOMENT_OPS_COLUMN_LOOPS

// Where the rows of a strip come from: as they lie in memory. Another source may compute them first, block by block.
template <class T>
struct RowsInMemory {
  using A = accumulate_t<T>;

  // The moments of a block of rows.
  void operator()(const Layer& layer, const Strip& strip, int64_t row, int64_t rows, StripMoments<A>& out) const {
    ColumnLoops<T>::block(layer.data<T>() + row * layer.row_stride + strip.begin, layer.row_stride, rows,
                          strip.end - strip.begin, out.pivot.data(), out.mean.data(), out.m2.data());
  }

  // A value of a block that was reduced.
  A value(const Layer& layer, int64_t row, int64_t column) const {
    return load(layer.data<T>()[row * layer.row_stride + column]);
  }
};

// One worker's memory.
template <class A>
struct Scratch {
  StripMoments<A> strip;
  PairwiseTree tree;
};

// Rows [begin, end) of a strip, one block after another, into the worker's tree.
template <class A, class Source>
inline void reduce_blocks(const Layer& layer, const Strip& strip, int64_t begin, int64_t end, Scratch<A>& mine,
                          const Source& source) {
  const int64_t columns = strip.end - strip.begin;
  for (int64_t row = begin; row < end; row += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, end - row);
    source(layer, strip, row, rows, mine.strip);
    mine.strip.widen(columns, mine.tree.next());
    mine.tree.push(rows, 1);
  }
}

// Calls epilogue(strip number, strip, means, variances) once per strip.
template <class T, class Epilogue, class Source = RowsInMemory<T>>
inline void reduce_columns(const std::vector<Layer>& layers, const std::vector<Strip>& strips, int64_t correction,
                           Epilogue epilogue, const Source& source = {}) {
  using A = accumulate_t<T>;
  struct Piece {
    int64_t strip, chunk;
  };
  std::vector<Piece> pieces;
  int64_t partials = 0;
  int64_t elements = 0;
  for (size_t i = 0; i < strips.size(); ++i) {
    const Strip& strip = strips[i];
    for (int64_t chunk = 0; chunk < strip.chunks; ++chunk) pieces.push_back({static_cast<int64_t>(i), chunk});
    if (strip.chunks > 1) partials = strip.partial + 2 * strip.chunks * (strip.end - strip.begin);
    elements += layers[strip.layer].rows * (strip.end - strip.begin);
  }
  std::vector<double> partial(partials);
  std::vector<Scratch<A>> scratch(torch::stable::get_num_threads());
  const auto finish = [&](int64_t index, StripMoments<A>& moments) {
    const Strip& strip = strips[index];
    const Layer& layer = layers[strip.layer];
    const int64_t columns = strip.end - strip.begin;
    if (!ColumnLoops<T>::finish(moments, columns, layer.rows, correction)) {
      const auto read = [&](int64_t row, int64_t column) { return source.value(layer, row, strip.begin + column); };
      moments.widen_range(columns, layer.rows, correction, read);
    }
    epilogue(index, strip, moments.mean.data(), moments.m2.data());
  };

  for_each_piece(pieces.size(), workers_for(elements), [&](int64_t i, int64_t worker) {
    const auto [index, chunk] = pieces[i];
    const Strip& strip = strips[index];
    const Layer& layer = layers[strip.layer];
    const int64_t columns = strip.end - strip.begin;
    Scratch<A>& mine = scratch[worker];
    mine.strip.resize(columns);
    if (layer.rows <= kBlockRows) {
      source(layer, strip, 0, layer.rows, mine.strip);
      return finish(index, mine.strip);
    }
    mine.tree.start(columns);
    const int64_t begin = chunk * strip.chunk_rows;
    reduce_blocks(layer, strip, begin, std::min(begin + strip.chunk_rows, layer.rows), mine, source);
    const double* moments = mine.tree.finish();
    if (strip.chunks == 1) {
      mine.strip.narrow(columns, moments);
      finish(index, mine.strip);
    } else {
      std::copy(moments, moments + 2 * columns, partial.data() + strip.partial + 2 * chunk * columns);
    }
  });

  if (partials == 0) return;
  for_each_piece(strips.size(), workers_for(elements), [&](int64_t index, int64_t worker) {
    const Strip& strip = strips[index];
    if (strip.chunks == 1) return;
    const int64_t columns = strip.end - strip.begin;
    Scratch<A>& mine = scratch[worker];
    mine.strip.resize(columns);
    mine.tree.start(columns);
    for (int64_t chunk = 0; chunk < strip.chunks; ++chunk) {
      const double* moments = partial.data() + strip.partial + 2 * chunk * columns;
      std::copy(moments, moments + 2 * columns, mine.tree.next());
      const int64_t rows = std::min(strip.chunk_rows, layers[strip.layer].rows - chunk * strip.chunk_rows);
      mine.tree.push(rows, (rows + kBlockRows - 1) / kBlockRows);
    }
    mine.strip.narrow(columns, mine.tree.finish());
    finish(index, mine.strip);
  });
}

}  // namespace moment_ops::cpu
