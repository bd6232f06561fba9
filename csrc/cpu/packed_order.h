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
  // Runs along the innermost dimension; a layer without any has one column.
  const Dimension inner = rank > 0 ? dimensions[rank - 1] : Dimension{1, 1, 1};
  for (int64_t column = 0; column < end - begin;) {
    const int64_t run = std::min(inner.size - (rank > 0 ? index[rank - 1] : 0), end - begin - column);
    for (int64_t i = 0; i < run; ++i) visit(column + i, logical + i * inner.logical);
    column += run;
    logical += run * inner.logical;
    if (rank > 0) index[rank - 1] += run;
    for (int i = rank - 1; i >= 0 && index[i] == dimensions[i].size; --i) {
      logical -= dimensions[i].size * dimensions[i].logical;
      index[i] = 0;
      if (i > 0) {
        logical += dimensions[i - 1].logical;
        ++index[i - 1];
      }
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
