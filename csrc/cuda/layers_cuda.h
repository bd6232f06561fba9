// Tensors as the GPU kernels want them.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

#include "cuda/launch_cuda.h"
#include "device/column_launch.h"
#include "layer.h"

namespace moment_ops::cuda {

using torch::stable::Tensor;

// The column order of a layer as (outer, inner) in memory and (inner, outer) in the packed vectors. Python copies layers
// whose order is more involved than channels-last.
inline ColumnLayer make_column_layer(const Layer& layer) {
  ColumnLayer result{};
  result.x = layer.tensor.const_data_ptr();
  result.row_stride = layer.row_stride;
  result.columns = layer.columns;
  result.offset = layer.offset;
  result.rows = static_cast<int32_t>(layer.rows);
  result.inner = 1;
  result.outer = 1;
  if (!layer.logical_order) {
    const Dimension& innermost = layer.dimensions.back();
    result.inner = static_cast<int32_t>(innermost.size);
    result.outer = static_cast<int32_t>(layer.columns / innermost.size);
    int64_t expected = 1;
    for (size_t i = layer.dimensions.size() - 1; i-- > 0;) {
      STD_TORCH_CHECK(layer.dimensions[i].logical == expected, "moment_ops: a column order that the kernels do not read");
      expected *= layer.dimensions[i].size;
    }
    STD_TORCH_CHECK(innermost.logical == result.outer, "moment_ops: a column order that the kernels do not read");
  }
  return result;
}

inline std::vector<ColumnLayer> make_column_layers(const std::vector<Layer>& layers) {
  std::vector<ColumnLayer> result;
  for (const Layer& layer : layers) {
    STD_TORCH_CHECK(layer.rows < (int64_t{1} << 31), "moment_ops: a layer with 2^31 or more rows");
    ColumnLayer column_layer = make_column_layer(layer);
    const int element_size = static_cast<int>(layer.tensor.element_size());
    column_layer.vectors = layer.columns * element_size % kVectorBytes == 0 &&
                           allows_vectors(column_layer.x, layer.row_stride, layer.rows, element_size);
    result.push_back(column_layer);
  }
  return result;
}

struct DeviceWorkspace {
  Tensor partial, tickets;
  Workspace pointers;
};

// Freshly zeroed tickets: a buffer that lived longer would be shared by streams.
inline DeviceWorkspace make_workspace(const Tensor& like, const Plan& plan, int64_t extra_tickets) {
  using torch::headeronly::ScalarType;
  DeviceWorkspace workspace{
      torch::stable::new_empty(like, {2 * plan.partial_columns}, ScalarType::Double),
      torch::stable::new_zeros(like, {(plan.partial_columns > 0 ? plan.strips : 0) + extra_tickets}, ScalarType::Int),
      {}};
  workspace.pointers.partial = static_cast<double*>(workspace.partial.mutable_data_ptr());
  workspace.pointers.tickets = static_cast<unsigned int*>(workspace.tickets.mutable_data_ptr()) + extra_tickets;
  return workspace;
}

}  // namespace moment_ops::cuda
