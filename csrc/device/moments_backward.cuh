// The gradient of moments for a list of layers in one launch: out = [grad +] a + b * (x - mean).
#pragma once

#include "device/column_layers.h"
#include "device/vector.h"

namespace moment_ops {

template <class A>
struct BackwardArguments {
  const A* grad_mean;  // packed, or null
  const A* grad_var;   // packed, or null
  const A* mean;
  const int64_t* count;  // per layer, over all launches
  const A* scale;        // one number, or null
  int64_t correction;
  int32_t first_layer;  // of this launch
};

inline constexpr int kApplyTile = 4;

// The coefficients of WIDTH columns: a = grad_mean * mean_scale, b = grad_var * var_scale.
template <int WIDTH, class A>
__device__ __forceinline__ void load_coefficients(const ColumnLayer& layer, int64_t column, const A* grad_mean,
                                                  const A* grad_var, const A* packed_mean, A mean_scale, A var_scale,
                                                  A (&a)[WIDTH], A (&b)[WIDTH], A (&mean)[WIDTH]) {
#pragma unroll
  for (int c = 0; c < WIDTH; ++c) {
    const int64_t packed = layer.packed(column + c);
    a[c] = grad_mean != nullptr ? grad_mean[packed] * mean_scale : A(0);
    const A var_gradient = grad_var != nullptr ? grad_var[packed] : A(0);
    // A variance that the loss does not use sends no gradient, also where it has no degrees of freedom.
    b[c] = var_gradient == A(0) ? A(0) : var_gradient * var_scale;
    mean[c] = packed_mean[packed];
  }
}

// ROWS rows of WIDTH columns; all loads are in flight before the first is used.
template <int ROWS, bool ADD, int WIDTH, class T, class A>
__device__ __forceinline__ void apply_rows(const ColumnLayer& layer, int64_t row, int64_t column, const A (&a)[WIDTH],
                                           const A (&b)[WIDTH], const A (&mean)[WIDTH]) {
  const T* x = static_cast<const T*>(layer.x) + row * layer.row_stride + column;
  const T* grad = static_cast<const T*>(layer.grad) + row * layer.grad_stride + column;
  T* out = static_cast<T*>(layer.out) + row * layer.out_stride + column;
  Vector<T, WIDTH> value[ROWS], added[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    value[r] = load_vector<WIDTH>(x + r * layer.row_stride);
    if constexpr (ADD) added[r] = load_vector<WIDTH>(grad + r * layer.grad_stride);
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    Vector<T, WIDTH> result;
#pragma unroll
    for (int c = 0; c < WIDTH; ++c) {
      A sum = a[c] + b[c] * (load(value[r].values[c]) - mean[c]);
      if constexpr (ADD) sum += load(added[r].values[c]);
      store(result.values[c], sum);
    }
    store_vector(out + r * layer.out_stride, result);
  }
}

template <bool ADD, int WIDTH, class T, class A>
__device__ __forceinline__ void apply_chunk(const ColumnLayer& layer, int chunk, int64_t column, const A (&a)[WIDTH],
                                            const A (&b)[WIDTH], const A (&mean)[WIDTH]) {
  int64_t row = static_cast<int64_t>(chunk) * kApplyRows;
  const int64_t end = row + kApplyRows < layer.rows ? row + kApplyRows : layer.rows;
  for (; row + kApplyTile <= end; row += kApplyTile) {
    apply_rows<kApplyTile, ADD, WIDTH, T>(layer, row, column, a, b, mean);
  }
  for (; row < end; ++row) apply_rows<1, ADD, WIDTH, T>(layer, row, column, a, b, mean);
}

template <int WIDTH, class T, class A>
__device__ __forceinline__ void backward_strip(const ColumnLayer& layer, int index, int strip, int chunk,
                                               const BackwardArguments<A>& arguments) {
  const int64_t column = (static_cast<int64_t>(strip) * kThreads + threadIdx.x) * WIDTH;
  if (column >= layer.columns) return;
  const double rows = static_cast<double>(arguments.count[arguments.first_layer + index]);
  const double factor = arguments.scale != nullptr ? static_cast<double>(*arguments.scale) : 1.0;
  const A mean_scale = static_cast<A>(factor / rows);
  const A var_scale = static_cast<A>(2 * factor / (rows - static_cast<double>(arguments.correction)));
  A a[WIDTH], b[WIDTH], mean[WIDTH];
  load_coefficients<WIDTH>(layer, column, arguments.grad_mean, arguments.grad_var, arguments.mean, mean_scale, var_scale,
                           a, b, mean);
  if (layer.grad != nullptr) {
    apply_chunk<true, WIDTH, T>(layer, chunk, column, a, b, mean);
  } else {
    apply_chunk<false, WIDTH, T>(layer, chunk, column, a, b, mean);
  }
}

template <class T, class A>
__global__ void __launch_bounds__(kThreads)
    moments_backward_kernel(const __grid_constant__ ColumnLayers list, BackwardArguments<A> arguments) {
  const int index = find_layer(list, blockIdx.x);
  const ColumnLayer& layer = list.layers[index];
  const int block = static_cast<int>(blockIdx.x) - layer.first_block;
  const int strip = block / layer.chunks, chunk = block % layer.chunks;
  if (layer.vectors) {
    backward_strip<kVectorBytes / sizeof(T), T>(layer, index, strip, chunk, arguments);
  } else {
    backward_strip<1, T>(layer, index, strip, chunk, arguments);
  }
}

}  // namespace moment_ops
