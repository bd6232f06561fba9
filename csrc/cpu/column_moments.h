// Mean and sum of squared deviations of a strip of columns, over a range of rows.
//
// Rows go in blocks of 512. Every column of a block is shifted by a pivot, the mean of its first tile, on load: without
// it the merges lose the bound of 1e-5 at |mean| / std = 1e3, and with the first row alone an outlier there costs the
// digits of all other rows. Tiles of eight rows, or of four, are reduced in registers and merged one after another.
// Blocks are merged in double as a pairwise tree whose shape depends on the row numbers alone; longer sequential runs of
// merges in float break the bound at a million rows.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "device/convert.h"
#include "device/merge.h"
#include "device/range.h"

namespace moment_ops::cpu {

inline constexpr int64_t kBlockRows = 512;

// One tile of ROWS rows, given by read(row, column), whose means are relative to the pivot. The FIRST of a block makes
// the pivot and writes its moments without reading any, which saves a pass over them.
template <bool FIRST, int ROWS, class A, class Read>
inline void reduce_tile(Read read, int64_t columns, A* __restrict pivot, MergeFactors<A> factors, A* __restrict mean,
                        A* __restrict m2) {
#pragma GCC ivdep
  for (int64_t j = 0; j < columns; ++j) {
    A value[ROWS];
    for (int r = 0; r < ROWS; ++r) value[r] = read(r, j);
    A shift;
    if constexpr (FIRST) {
      // Relative to the first row, so that the pivot of a constant column is that constant.
      shift = 0;
      for (int r = 1; r < ROWS; ++r) shift += value[r] - value[0];
      shift = value[0] + shift * (A(1) / ROWS);
      pivot[j] = shift;
    } else {
      shift = pivot[j];
    }
    A tile_mean = 0;
    for (int r = 0; r < ROWS; ++r) {
      value[r] -= shift;
      tile_mean += value[r];
    }
    tile_mean *= A(1) / ROWS;
    A tile_m2 = 0;
    for (int r = 0; r < ROWS; ++r) {
      const A deviation = value[r] - tile_mean;
      tile_m2 += deviation * deviation;
    }
    if constexpr (FIRST) {
      mean[j] = tile_mean;
      m2[j] = tile_m2;
    } else {
      merge(mean[j], m2[j], tile_mean, tile_m2, factors);
    }
  }
}

// The moments of a block of rows, in tiles of TILE rows, then of four, two and one; tile_at(row) is the `read` of the
// tile that begins there.
template <int TILE, class A, class TileAt>
inline void block_moments(TileAt tile_at, int64_t rows, int64_t columns, A* pivot, A* mean, A* m2) {
  int64_t row = 0;
  const auto tiles = [&](auto tile_rows) {
    constexpr int ROWS = decltype(tile_rows)::value;
    for (; row + ROWS <= rows; row += ROWS) {
      const auto read = tile_at(row);
      const MergeFactors<A> factors = merge_factors<A>(row, ROWS);
      if (row == 0) {
        reduce_tile<true, ROWS>(read, columns, pivot, factors, mean, m2);
      } else {
        reduce_tile<false, ROWS>(read, columns, pivot, factors, mean, m2);
      }
    }
  };
  if (TILE > 4) tiles(std::integral_constant<int, TILE>{});
  tiles(std::integral_constant<int, 4>{});
  tiles(std::integral_constant<int, 2>{});
  tiles(std::integral_constant<int, 1>{});
}

// Pairwise merging of equal groups of rows that arrive in order, as a binary counter carries. Means are absolute.
// The tree is the same however the rows were dealt out, as long as the dealt ranges are aligned powers of two.
class PairwiseTree {
 public:
  void start(int64_t columns) {
    columns_ = columns;
    used_ = 0;
    rows_.clear();
    groups_.clear();
  }

  // Where the next group's moments go: mean first, then m2.
  double* next() {
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
  const double* finish() {
    while (used_ > 1) merge_last();
    return levels_[0].data();
  }

 private:
  void merge_last() {
    double* __restrict a = levels_[used_ - 2].data();
    const double* __restrict b = levels_[used_ - 1].data();
    const MergeFactors<double> factors = merge_factors<double>(rows_[used_ - 2], rows_[used_ - 1]);
    for (int64_t j = 0; j < columns_; ++j) merge(a[j], a[columns_ + j], b[j], b[columns_ + j], factors);
    rows_[used_ - 2] += rows_[used_ - 1];
    groups_[used_ - 2] += groups_[used_ - 1];
    rows_.pop_back();
    groups_.pop_back();
    --used_;
  }

  int64_t columns_ = 0;
  size_t used_ = 0;
  std::vector<std::vector<double>> levels_;
  std::vector<int64_t> rows_, groups_;
};

// A strip's moments while they are being reduced: means relative to the pivot, or absolute with a pivot of zero.
template <class A>
struct StripMoments {
  std::vector<A> pivot, mean, m2;

  void resize(int64_t columns) {
    if (pivot.size() >= static_cast<size_t>(columns)) return;
    pivot.resize(columns);
    mean.resize(columns);
    m2.resize(columns);
  }

  void widen(int64_t columns, double* out) const {
    for (int64_t j = 0; j < columns; ++j) {
      out[j] = static_cast<double>(pivot[j]) + static_cast<double>(mean[j]);
      out[columns + j] = static_cast<double>(m2[j]);
    }
  }

  void narrow(int64_t columns, const double* from) {
    for (int64_t j = 0; j < columns; ++j) {
      pivot[j] = 0;
      mean[j] = static_cast<A>(from[j]);
      m2[j] = static_cast<A>(from[columns + j]);
    }
  }

  // Means become absolute and m2 the variance: NaN where there are no degrees of freedom, as in torch. False where
  // something that is not finite came out.
  bool finish(int64_t columns, int64_t rows, int64_t correction) {
    const A scale = rows > correction ? A(1 / static_cast<double>(rows - correction)) : std::numeric_limits<A>::quiet_NaN();
    int32_t not_finite = 0;
    for (int64_t j = 0; j < columns; ++j) {
      mean[j] += pivot[j];
      not_finite |= !is_finite(mean[j]) | !is_finite(m2[j]);
      m2[j] *= scale;
    }
    return not_finite == 0;
  }

  // Works out anew, from read(row, column), what is not finite. Out of line: hardly ever.
  template <class Read>
  __attribute__((noinline)) void widen_range(int64_t columns, int64_t rows, int64_t correction, const Read& read) {
    for (int64_t j = 0; j < columns; ++j) {
      if (is_finite(mean[j]) && (rows <= correction || is_finite(m2[j]))) continue;
      wide_moments([&](int64_t row) { return read(row, j); }, rows, correction, mean[j], m2[j]);
    }
  }
};

}  // namespace moment_ops::cpu
