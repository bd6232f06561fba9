// A tap on the GPU: bias, ReLU and the moments of the result in one pass, and the gradient of all three in one pass.
#pragma once

#include <type_traits>

#include "device/column_moments.cuh"
#include "device/moments_backward.cuh"

namespace moment_ops {

// torch's ReLU: what is below zero becomes zero; NaN and -0 stay.
template <class T>
__device__ __forceinline__ T relu(T value) {
  if constexpr (std::is_floating_point_v<T>) {
    return value < T(0) ? T(0) : value;
  } else {
    return load(value) < 0.f ? T{0} : value;
  }
}

template <class T>
struct ReluArguments {
  const T* bias;  // per channel, or null
  T* y;
  int64_t y_stride;         // between rows
  int64_t channel_columns;  // columns of one channel, in packed order
};

// Rows that become relu(x + bias) on their way and are kept; their moments are those of what is kept.
template <class T, int WIDTH>
struct ReluRows {
  FeatureRows<T, WIDTH> from;
  T* y;
  int64_t y_stride;
  bool has_bias;
  accumulate_t<T> bias[WIDTH];

  __device__ __forceinline__ Vector<T, WIDTH> load(int row) const { return from.load(row); }

  __device__ __forceinline__ Vector<T, WIDTH> value(Vector<T, WIDTH> raw) const {
#pragma unroll
    for (int c = 0; c < WIDTH; ++c) {
      // Rounded before the ReLU, as by an addition of its own.
      if (has_bias) store(raw.values[c], moment_ops::load(raw.values[c]) + bias[c]);
      raw.values[c] = relu(raw.values[c]);
    }
    return raw;
  }

  __device__ __forceinline__ void keep(int row, const Vector<T, WIDTH>& value) const {
    store_vector(y + row * y_stride, value);
  }
};

template <int WIDTH, class T>
struct ReluOf {
  const ColumnLayer& layer;
  const ReluArguments<T>& arguments;

  __device__ __forceinline__ ReluRows<T, WIDTH> operator()(int64_t column) const {
    ReluRows<T, WIDTH> rows{FeaturesOf<WIDTH, T>{layer}(column), arguments.y + column, arguments.y_stride,
                            arguments.bias != nullptr, {}};
    if (rows.has_bias) {
#pragma unroll
      for (int c = 0; c < WIDTH; ++c) {
        rows.bias[c] = load(arguments.bias[(layer.packed(column + c) - layer.offset) / arguments.channel_columns]);
      }
    }
    return rows;
  }
};

// Three blocks to a multiprocessor, not the four of the plain reduction: the bias is held in registers, too.
template <class T, class A>
__global__ void __launch_bounds__(kThreads, 3)
    relu_moments_kernel(const __grid_constant__ ColumnLayer layer, ReluArguments<T> arguments, Workspace workspace,
                        MomentsOutput<A> out) {
  constexpr int WIDTH = kVectorBytes / sizeof(T);
  __shared__ GroupMoments<WIDTH> shared;
  const int strip = static_cast<int>(blockIdx.x) / layer.chunks, chunk = static_cast<int>(blockIdx.x) % layer.chunks;
  if (layer.vectors) {
    moments_strip<WIDTH>(layer, strip, chunk, workspace, shared, out, ReluOf<WIDTH, T>{layer, arguments});
  } else {
    moments_strip<1>(layer, strip, chunk, workspace, reinterpret_cast<GroupMoments<1>&>(shared), out,
                     ReluOf<1, T>{layer, arguments});
  }
}

template <class A>
struct ReluBackwardArguments {
  const A* grad_mean;  // packed, or null
  const A* grad_var;   // packed, or null
  const A* mean;
  int64_t correction;
};

// ROWS rows of out = (grad + a + b (y - mean)) * !(y <= 0).
template <int ROWS, bool ADD, int WIDTH, class T, class A>
__device__ __forceinline__ void relu_backward_rows(const ColumnLayer& layer, int64_t row, int64_t column,
                                                   const A (&a)[WIDTH], const A (&b)[WIDTH], const A (&mean)[WIDTH]) {
  const T* y = static_cast<const T*>(layer.x) + row * layer.row_stride + column;
  const T* grad = static_cast<const T*>(layer.grad) + row * layer.grad_stride + column;
  T* out = static_cast<T*>(layer.out) + row * layer.out_stride + column;
  Vector<T, WIDTH> value[ROWS], added[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    value[r] = load_vector<WIDTH>(y + r * layer.row_stride);
    if constexpr (ADD) added[r] = load_vector<WIDTH>(grad + r * layer.grad_stride);
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    Vector<T, WIDTH> result;
#pragma unroll
    for (int c = 0; c < WIDTH; ++c) {
      const A here = load(value[r].values[c]);
      A sum = a[c] + b[c] * (here - mean[c]);
      if constexpr (ADD) sum += load(added[r].values[c]);
      store(result.values[c], here <= A(0) ? A(0) : sum);
    }
    store_vector(out + r * layer.out_stride, result);
  }
}

template <bool ADD, int WIDTH, class T, class A>
__device__ __forceinline__ void relu_backward_strip(const ColumnLayer& layer, int strip, int chunk,
                                                    const ReluBackwardArguments<A>& arguments) {
  const int64_t column = (static_cast<int64_t>(strip) * kThreads + threadIdx.x) * WIDTH;
  if (column >= layer.columns) return;
  const double rows = static_cast<double>(layer.rows);
  const A mean_scale = static_cast<A>(1 / rows);
  const A var_scale = static_cast<A>(2 / (rows - static_cast<double>(arguments.correction)));
  A a[WIDTH], b[WIDTH], mean[WIDTH];
  load_coefficients<WIDTH>(layer, column, arguments.grad_mean, arguments.grad_var, arguments.mean, mean_scale, var_scale,
                           a, b, mean);
  int64_t row = static_cast<int64_t>(chunk) * kApplyRows;
  const int64_t end = row + kApplyRows < layer.rows ? row + kApplyRows : layer.rows;
  for (; row + kApplyTile <= end; row += kApplyTile) {
    relu_backward_rows<kApplyTile, ADD, WIDTH, T>(layer, row, column, a, b, mean);
  }
  for (; row < end; ++row) relu_backward_rows<1, ADD, WIDTH, T>(layer, row, column, a, b, mean);
}

template <class T, class A>
__global__ void __launch_bounds__(kThreads, 5)
    relu_moments_backward_kernel(const __grid_constant__ ColumnLayer layer, ReluBackwardArguments<A> arguments) {
  constexpr int WIDTH = kVectorBytes / sizeof(T);
  const int strip = static_cast<int>(blockIdx.x) / layer.chunks, chunk = static_cast<int>(blockIdx.x) % layer.chunks;
  if (layer.grad != nullptr) {
    if (layer.vectors) {
      relu_backward_strip<true, WIDTH, T>(layer, strip, chunk, arguments);
    } else {
      relu_backward_strip<true, 1, T>(layer, strip, chunk, arguments);
    }
  } else if (layer.vectors) {
    relu_backward_strip<false, WIDTH, T>(layer, strip, chunk, arguments);
  } else {
    relu_backward_strip<false, 1, T>(layer, strip, chunk, arguments);
  }
}

}  // namespace moment_ops
