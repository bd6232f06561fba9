// A layer as the kernels see it: rows to reduce over, and columns that lie densely in memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace moment_ops::cpu {

using torch::stable::Tensor;

struct Dimension {
  int64_t size;
  int64_t stride;   // in memory, elements
  int64_t logical;  // stride in the packed vectors, which are in logical row-major order
};

struct Layer {
  Tensor tensor;
  int64_t rows;
  int64_t row_stride;
  int64_t columns;
  int64_t offset;  // of the layer's first column in the packed vectors
  // The feature dimensions in memory order, outermost first.
  std::vector<Dimension> dimensions;
  bool logical_order;  // memory order is the packed order

  template <class T>
  const T* data() const {
    return static_cast<const T*>(tensor.const_data_ptr());
  }
};

// `dim` is the dimension that is reduced. Fails if the columns are not dense; Python hands such inputs over as a copy.
inline Layer make_layer(const Tensor& tensor, int64_t dim, int64_t offset) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const int64_t rank = tensor.dim();
  const int64_t reduced = dim < 0 ? dim + rank : dim;
  Layer layer{tensor, sizes[reduced], strides[reduced], 1, offset, {}, true};
  for (int64_t i = rank - 1; i >= 0; --i) {
    if (i == reduced) continue;
    if (sizes[i] != 1) layer.dimensions.push_back({sizes[i], strides[i], layer.columns});
    layer.columns *= sizes[i];
  }
  std::stable_sort(layer.dimensions.begin(), layer.dimensions.end(),
                   [](const Dimension& a, const Dimension& b) { return a.stride < b.stride; });
  int64_t expected = 1;
  for (const Dimension& dimension : layer.dimensions) {
    STD_TORCH_CHECK(dimension.stride == expected, "moment_ops: the columns of a layer are not dense in memory");
    layer.logical_order = layer.logical_order && dimension.logical == expected;
    expected *= dimension.size;
  }
  std::reverse(layer.dimensions.begin(), layer.dimensions.end());
  return layer;
}

inline std::vector<Layer> make_layers(const std::vector<Tensor>& input, int64_t dim) {
  std::vector<Layer> layers;
  layers.reserve(input.size());
  int64_t offset = 0;
  for (const Tensor& tensor : input) {
    layers.push_back(make_layer(tensor, dim, offset));
    offset += layers.back().columns;
  }
  return layers;
}

// Walks the packed positions of the columns [begin, end), given in memory order.
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
  for (int64_t column = 0; column < end - begin; ++column) {
    visit(column, logical);
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

}  // namespace moment_ops::cpu
