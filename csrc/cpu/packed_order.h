// Strips of packed vectors in the memory order of a layer's columns, and back.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "layer.h"

namespace moment_ops::cpu {

// Walks the packed positions of the columns [begin, end), given in memory order: visit(column, logical).
template <class Visit>
inline void for_each_logical(const Layer& layer, int64_t begin, int64_t end, Visit visit) {
  const auto& dimensions = layer.dimensions;
  const int rank = static_cast<int>(dimensions.size());
  std::vector<int64_t> index(rank);
  int64_t rest = begin;
  int64_t logical = layer.offset;
  for (int i = rank - 1; i >= 0; --i) {
    index[i] = rest % dimensions[i].size;
    rest /= dimensions[i].size;
    logical += index[i] * dimensions[i].logical;
  }
  if (rank == 0) return visit(0, logical);
  // Runs along the innermost dimension.
  const Dimension inner = dimensions[rank - 1];
  for (int64_t column = 0; column < end - begin;) {
    const int64_t run = std::min(inner.size - index[rank - 1], end - begin - column);
    for (int64_t i = 0; i < run; ++i) visit(column + i, logical + i * inner.logical);
    column += run;
    logical += (run - 1) * inner.logical;
    index[rank - 1] += run - 1;
    for (int i = rank - 1; i >= 0; --i) {
      logical += dimensions[i].logical;
      if (++index[i] < dimensions[i].size) break;
      logical -= dimensions[i].size * dimensions[i].logical;
      index[i] = 0;
    }
  }
}

// The packed entries of a strip of columns in memory order: a pointer into `packed` where the orders agree, else a copy.
template <class A>
inline const A* gather(const Layer& layer, const A* packed, int64_t begin, int64_t end, A* buffer) {
  if (layer.logical_order) return packed + layer.offset + begin;
  for_each_logical(layer, begin, end, [&](int64_t column, int64_t logical) { buffer[column] = packed[logical]; });
  return buffer;
}

template <class A>
inline void scatter(const Layer& layer, const A* values, int64_t begin, int64_t end, A* packed) {
  if (layer.logical_order) {
    std::copy(values, values + (end - begin), packed + layer.offset + begin);
  } else {
    for_each_logical(layer, begin, end, [&](int64_t column, int64_t logical) { packed[logical] = values[column]; });
  }
}

}  // namespace moment_ops
