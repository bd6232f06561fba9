// A tap on the GPU: bias, ReLU and the moments of the result in one pass, and the gradient of all three in one pass.
#pragma once

#include "device/column_moments.cuh"
#include "device/moments_backward.cuh"

namespace moment_ops {

template <class T>
struct ReluArguments {
  const T* bias;  // per channel, or null
  T* y;
  int64_t y_stride;         // between rows
  uint32_t channel_columns;  // columns of one channel, in packed order; of all channels, too, they are 32-bit numbers
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

  // torch's ReLU: what is below zero becomes zero; NaN and -0 stay. To round first, as an addition of its own would,
  // makes no difference: the sum of two features is never rounded to zero, nor across it.
  __device__ __forceinline__ Vector<T, WIDTH> value(const Vector<T, WIDTH>& raw) const {
    accumulate_t<T> result[WIDTH];
#pragma unroll
    for (int c = 0; c < WIDTH; ++c) {
      const accumulate_t<T> sum = has_bias ? raw[c] + bias[c] : raw[c];
      result[c] = sum < 0 ? 0 : sum;
    }
    return to_vector<T>(result);
  }

  __device__ __forceinline__ void keep(int row, const Vector<T, WIDTH>& value) const {
    store_vector(y + row * y_stride, value);
  }
};

template <class T>
struct ReluOf {
  const ColumnLayer& layer;
  const ReluArguments<T>& arguments;

  template <int WIDTH>
  __device__ __forceinline__ ReluRows<T, WIDTH> rows(int64_t column) const {
    ReluRows<T, WIDTH> rows{FeaturesOf<T>{layer}.template rows<WIDTH>(column), arguments.y + column, arguments.y_stride,
                            arguments.bias != nullptr, {}};
    if (rows.has_bias) {
      int64_t at[WIDTH];
      layer.packed(column, at);
#pragma unroll
      for (int c = 0; c < WIDTH; ++c) {
        rows.bias[c] = load(arguments.bias[static_cast<uint32_t>(at[c] - layer.offset) / arguments.channel_columns]);
      }
    }
    return rows;
  }
};

template <class T, class A>
__global__ void __launch_bounds__(kThreads, 4)
    relu_moments_kernel(const __grid_constant__ ColumnLayer layer, ReluArguments<T> arguments, Workspace workspace,
                        MomentsOutput<A> out) {
  constexpr int WIDTH = kVectorBytes / sizeof(T);
  __shared__ BlockMoments<WIDTH> moments;
  const ReluOf<T> results{layer, arguments};
  if (layer.vectors) {
    moments_strip(layer, workspace, moments, out, results);
  } else {
    moments_strip(layer, workspace, reinterpret_cast<BlockMoments<1>&>(moments), out, results);
  }
}

// out = (grad + a + b (y - mean)) * !(y <= 0).
template <class T, class A>
__global__ void __launch_bounds__(kThreads, 5)
    relu_moments_backward_kernel(const __grid_constant__ ColumnLayer layer, MomentGradients<A> moments) {
  constexpr int WIDTH = kVectorBytes / sizeof(T);
  if (layer.vectors) {
    backward_strip<true, WIDTH, T>(layer, moments, layer.rows);
  } else {
    backward_strip<true, 1, T>(layer, moments, layer.rows);
  }
}

}  // namespace moment_ops
