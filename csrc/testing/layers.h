// Layers and workspaces of host memory, made as the CUDA operators make theirs.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "device/match.cuh"

namespace moment_ops {

// A layer as its user describes it; addresses are of memory that the user keeps alive.
struct LayerDescription {
  uintptr_t x;
  int64_t row_stride;
  int32_t rows;
  int64_t columns;
  int32_t inner, outer;
  uintptr_t grad = 0;
  int64_t grad_stride = 0;
  uintptr_t out = 0;
  int64_t out_stride = 0;
};

inline std::vector<ColumnLayer> make_layers(const std::vector<LayerDescription>& descriptions, int element_size) {
  std::vector<ColumnLayer> layers;
  int64_t offset = 0;
  for (const LayerDescription& d : descriptions) {
    ColumnLayer layer{};
    layer.x = reinterpret_cast<const void*>(d.x);
    layer.grad = reinterpret_cast<const void*>(d.grad);
    layer.out = reinterpret_cast<void*>(d.out);
    layer.row_stride = d.row_stride;
    layer.grad_stride = d.grad_stride;
    layer.out_stride = d.out_stride;
    layer.columns = d.columns;
    layer.offset = offset;
    layer.rows = d.rows;
    layer.inner = d.inner;
    layer.outer = d.outer;
    layer.vectors = d.columns * element_size % kVectorBytes == 0 &&
                    allows_vectors(layer.x, d.row_stride, d.rows, element_size) &&
                    (d.out == 0 || allows_vectors(layer.out, d.out_stride, d.rows, element_size)) &&
                    (d.grad == 0 || allows_vectors(layer.grad, d.grad_stride, d.rows, element_size));
    offset += d.columns;
    layers.push_back(layer);
  }
  return layers;
}

// The size of each block of memory matters to the address sanitizer: vectors, not one arena.
struct HostWorkspace {
  std::vector<double> partial;
  std::vector<unsigned int> tickets;
  Workspace pointers;

  explicit HostWorkspace(const Plan& plan)
      : partial(shim::allocate(2 * plan.partial_columns, std::nan(""))),
        tickets(shim::allocate(plan.partial_columns > 0 ? plan.strips : 0, 0u)) {
    pointers = {partial.data(), tickets.data()};
  }
};

struct HostLosses {
  std::vector<double> losses;
  std::vector<unsigned int> ticket;
  LossWorkspace pointers;

  explicit HostLosses(int strips) : losses(shim::allocate(strips, std::nan(""))), ticket(shim::allocate(1, 0u)) {
    pointers = {losses.data(), ticket.data(), strips};
  }
};

}  // namespace moment_ops
