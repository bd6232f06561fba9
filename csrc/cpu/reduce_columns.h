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
#include "cpu/layer.h"

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
    MOMENT_OPS_CLONES static void pivot(const T* row, int64_t columns, A* out) { load_pivot(row, columns, out); }  \
    MOMENT_OPS_CLONES static void block(const T* x, int64_t row_stride, int64_t rows, int64_t columns, bool first, \
                                        A* pivot, A* mean, A* m2) {                                                \
      if (first) {                                                                                                 \
        block_moments<true>(x, row_stride, rows, columns, pivot, mean, m2);                                        \
      } else {                                                                                                     \
        block_moments<false>(x, row_stride, rows, columns, pivot, mean, m2);                                       \
      }                                                                                                            \
    }                                                                                                              \
  };
MOMENT_OPS_COLUMN_LOOPS(double)
MOMENT_OPS_COLUMN_LOOPS(float)
MOMENT_OPS_COLUMN_LOOPS(Half)
MOMENT_OPS_COLUMN_LOOPS(BFloat16)
#undef MOMENT_OPS_COLUMN_LOOPS

// Calls epilogue(strip number, strip, worker, pivot, mean, m2) once per strip; means are relative to the pivot.
template <class T, class Epilogue>
inline void reduce_columns(const std::vector<Layer>& layers, const std::vector<Strip>& strips, Epilogue epilogue) {
  using A = accumulate_t<T>;
  struct Scratch {
    std::vector<A> pivot;
    PairwiseTree<A> tree;
  };
  std::vector<Scratch> scratch(torch::stable::get_num_threads());

  // Pieces that begin at row 0 get their pivot in the pass that reduces it.
  const auto start = [&](const Strip& strip, Scratch& mine, bool load_row) {
    const int64_t columns = strip.end - strip.begin;
    if (mine.pivot.size() < static_cast<size_t>(columns)) mine.pivot.resize(columns);
    mine.tree.start(columns);
    if (load_row) {
      ColumnLoops<T>::pivot(layers[strip.layer].template data<T>() + strip.begin, columns, mine.pivot.data());
    }
  };
  const auto reduce_rows = [&](const Strip& strip, Scratch& mine, int64_t row_begin, int64_t row_end) {
    const Layer& layer = layers[strip.layer];
    const int64_t columns = strip.end - strip.begin;
    for (int64_t row = row_begin; row < row_end; row += kBlockRows) {
      const int64_t rows = std::min(kBlockRows, row_end - row);
      A* out = mine.tree.next();
      ColumnLoops<T>::block(layer.template data<T>() + row * layer.row_stride + strip.begin, layer.row_stride, rows,
                            columns, row == 0, mine.pivot.data(), out, out + columns);
      mine.tree.push(rows, 1);
    }
    return mine.tree.finish();
  };

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
  std::vector<A> partial(partials);

  for_each_piece(pieces.size(), workers_for(elements), [&](int64_t i, int64_t worker) {
    const auto [index, chunk] = pieces[i];
    const Strip& strip = strips[index];
    const int64_t columns = strip.end - strip.begin;
    Scratch& mine = scratch[worker];
    const int64_t row_begin = chunk * strip.chunk_rows;
    start(strip, mine, row_begin > 0);
    const int64_t row_end = std::min(row_begin + strip.chunk_rows, layers[strip.layer].rows);
    A* moments = reduce_rows(strip, mine, row_begin, row_end);
    if (strip.chunks == 1) {
      epilogue(index, strip, worker, mine.pivot.data(), moments, moments + columns);
    } else {
      std::copy(moments, moments + 2 * columns, partial.data() + strip.partial + 2 * chunk * columns);
    }
  });

  if (partials == 0) return;
  for_each_piece(strips.size(), workers_for(elements), [&](int64_t index, int64_t worker) {
    const Strip& strip = strips[index];
    if (strip.chunks == 1) return;
    const int64_t columns = strip.end - strip.begin;
    Scratch& mine = scratch[worker];
    start(strip, mine, true);
    for (int64_t chunk = 0; chunk < strip.chunks; ++chunk) {
      const A* moments = partial.data() + strip.partial + 2 * chunk * columns;
      std::copy(moments, moments + 2 * columns, mine.tree.next());
      const int64_t rows = std::min(strip.chunk_rows, layers[strip.layer].rows - chunk * strip.chunk_rows);
      mine.tree.push(rows, (rows + kBlockRows - 1) / kBlockRows);
    }
    A* moments = mine.tree.finish();
    epilogue(index, strip, worker, mine.pivot.data(), moments, moments + columns);
  });
}

// Calls body with a value of the feature type that matches the tensor's dtype.
template <class Body>
inline void dispatch_dtype(const Tensor& tensor, Body body) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    case ScalarType::Half: return body(Half{});
    case ScalarType::BFloat16: return body(BFloat16{});
    default: STD_TORCH_CHECK(false, "moment_ops: unsupported dtype");
  }
}

}  // namespace moment_ops::cpu
