// A layer as every backend sees it: rows to reduce over, and columns that lie densely in memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "device/convert.h"

namespace moment_ops {

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

}  // namespace moment_ops
