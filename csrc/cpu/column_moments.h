// Mean and sum of squared deviations of a strip of columns, over a range of rows.
//
// Every column is shifted by a pivot, its first row, on load: without it the merges lose the bound of 1e-5 at
// |mean| / std = 1e3. Tiles of eight rows are reduced in registers and merged one after another inside blocks of 512
// rows; blocks are merged as a pairwise tree whose shape depends on the row numbers alone. Longer runs of sequential
// merges break the bound at a million rows.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/convert.h"
#include "device/merge.h"

namespace moment_ops::cpu {

inline constexpr int64_t kBlockRows = 512;

// What a tile finds: nothing but the features, also a pivot, or moments to merge with.
enum class Tile { first, start, merge };

// One tile of ROWS rows, whose means are relative to the pivot. The first tile of a strip makes its first row the pivot;
// the first of a block writes its moments without reading any, which saves a pass over them.
template <Tile TILE, int ROWS, class T, class A>
inline void reduce_tile(const T* __restrict x, int64_t row_stride, int64_t columns, A* __restrict pivot,
                        MergeFactors<A> factors, A* __restrict mean, A* __restrict m2) {
#pragma GCC ivdep
  for (int64_t j = 0; j < columns; ++j) {
    const A shift = TILE == Tile::first ? load(x[j]) : pivot[j];
    A value[ROWS];
    A tile_mean = 0;
    for (int r = 0; r < ROWS; ++r) {
      value[r] = load(x[r * row_stride + j]) - shift;
      tile_mean += value[r];
    }
    tile_mean *= A(1) / ROWS;
    A tile_m2 = 0;
    for (int r = 0; r < ROWS; ++r) {
      const A deviation = value[r] - tile_mean;
      tile_m2 += deviation * deviation;
    }
    if constexpr (TILE == Tile::merge) {
      merge(mean[j], m2[j], tile_mean, tile_m2, factors);
    } else {
      if constexpr (TILE == Tile::first) pivot[j] = shift;
      mean[j] = tile_mean;
      m2[j] = tile_m2;
    }
  }
}

// Tiles of eight rows, then of four, two and one. FIRST: the block holds row 0, and its pivot is yet to be loaded.
template <bool FIRST, class T, class A>
inline void block_moments(const T* x, int64_t row_stride, int64_t rows, int64_t columns, A* pivot, A* mean, A* m2) {
  int64_t row = 0;
  const auto tiles = [&](auto tile_rows) {
    constexpr int ROWS = decltype(tile_rows)::value;
    for (; row + ROWS <= rows; row += ROWS) {
      const T* tile = x + row * row_stride;
      const MergeFactors<A> factors(row, ROWS);
      if (row == 0) {
        reduce_tile<FIRST ? Tile::first : Tile::start, ROWS>(tile, row_stride, columns, pivot, factors, mean, m2);
      } else {
        reduce_tile<Tile::merge, ROWS>(tile, row_stride, columns, pivot, factors, mean, m2);
      }
    }
  };
  tiles(std::integral_constant<int, 8>{});
  tiles(std::integral_constant<int, 4>{});
  tiles(std::integral_constant<int, 2>{});
  tiles(std::integral_constant<int, 1>{});
}

template <class A>
inline void merge_strips(A* __restrict mean_a, A* __restrict m2_a, const A* __restrict mean_b,
                         const A* __restrict m2_b, int64_t columns, MergeFactors<A> factors) {
  for (int64_t j = 0; j < columns; ++j) merge(mean_a[j], m2_a[j], mean_b[j], m2_b[j], factors);
}

// Pairwise merging of equal groups of rows that arrive in order, as a binary counter carries.
// The tree is the same however the rows were dealt out, as long as the dealt ranges are aligned powers of two.
template <class A>
class PairwiseTree {
 public:
  void start(int64_t columns) {
    columns_ = columns;
    used_ = 0;
    rows_.clear();
    groups_.clear();
  }

  // Where the next group's moments go: mean first, then m2.
  A* next() {
    if (used_ == levels_.size()) levels_.emplace_back();
    if (levels_[used_].size() < static_cast<size_t>(2 * columns_)) levels_[used_].resize(2 * columns_);
    return levels_[used_].data();
  }

  void push(int64_t rows, int64_t groups) {
    rows_.push_back(rows);
    groups_.push_back(groups);
    ++used_;
    while (used_ > 1 && groups_[used_ - 2] == groups_[used_ - 1]) merge_last();
  }

  // Folds what is left and returns mean, then m2.
  A* finish() {
    while (used_ > 1) merge_last();
    return levels_[0].data();
  }

 private:
  void merge_last() {
    A* a = levels_[used_ - 2].data();
    const A* b = levels_[used_ - 1].data();
    merge_strips(a, a + columns_, b, b + columns_, columns_, MergeFactors<A>(rows_[used_ - 2], rows_[used_ - 1]));
    rows_[used_ - 2] += rows_[used_ - 1];
    groups_[used_ - 2] += groups_[used_ - 1];
    rows_.pop_back();
    groups_.pop_back();
    --used_;
  }

  int64_t columns_ = 0;
  size_t used_ = 0;
  std::vector<std::vector<A>> levels_;
  std::vector<int64_t> rows_, groups_;
};

template <class T, class A>
inline void load_pivot(const T* row, int64_t columns, A* pivot) {
  for (int64_t j = 0; j < columns; ++j) pivot[j] = load(row[j]);
}

// mean += pivot, m2 becomes the variance: NaN where there are no degrees of freedom, as in torch.
template <class A>
inline void finish_moments(const A* __restrict pivot, int64_t columns, double degrees_of_freedom, A* __restrict mean,
                           A* __restrict m2) {
  const A scale = degrees_of_freedom > 0 ? A(1 / degrees_of_freedom) : std::numeric_limits<A>::quiet_NaN();
  for (int64_t j = 0; j < columns; ++j) {
    mean[j] += pivot[j];
    m2[j] *= scale;
  }
}

}  // namespace moment_ops::cpu
