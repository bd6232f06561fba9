// Gradients of moments: out = [grad +] a + b * (x - mean), for a list of layers in one launch.
#pragma once

#include "device/range.h"
#include "device/thread_share.cuh"
#include "device/vector.h"

namespace moment_ops {

template <class A>
struct MomentGradients {
  const A* grad_mean;  // packed, or null
  const A* grad_var;   // packed, or null
  const A* mean;
  const A* scale;  // of both gradients: one number, or null
  int64_t correction;
};

template <class A>
struct BackwardArguments {
  MomentGradients<A> moments;
  const int64_t* count;  // per layer, over all launches
  int32_t first_layer;   // of this launch
};

// Of WIDTH columns, as in scaled_gradient.
template <class A, int WIDTH>
struct Coefficients {
  A a[WIDTH], b[WIDTH], mean[WIDTH], scale;
  bool has_var;  // without, features that are NaN do not touch the gradient of their mean
};

// Of columns at these packed places, for moments of `rows` rows, which are in memory, too. All loads are in flight
// before the first is used: the scale is converted where it is loaded, and comes last.
template <int WIDTH, class A>
__device__ __forceinline__ Coefficients<A, WIDTH> load_coefficients(const int64_t (&at)[WIDTH],
                                                                    const MomentGradients<A>& moments,
                                                                    const int64_t& rows) {
  // What is missing is read elsewhere and dropped: a branch for each would be a version of the code for all of them.
  const A* grad_mean = moments.grad_mean != nullptr ? moments.grad_mean : moments.mean;
  const A* grad_var = moments.grad_var != nullptr ? moments.grad_var : moments.mean;
  Coefficients<A, WIDTH> result;
  result.has_var = moments.grad_var != nullptr;
#pragma unroll
  for (int c = 0; c < WIDTH; ++c) {
    result.a[c] = grad_mean[at[c]];
    result.b[c] = grad_var[at[c]];
    result.mean[c] = moments.mean[at[c]];
  }
  const A scale = moments.scale != nullptr ? *moments.scale : A(1);
  const auto share = [&](int64_t count) { return static_cast<double>(scale) / static_cast<double>(count); };
  const A mean_scale = static_cast<A>(share(rows));
  const A var_scale = static_cast<A>(2 * share(rows - moments.correction));
  bool large = false;
#pragma unroll
  for (int c = 0; c < WIDTH; ++c) large |= std::abs(result.mean[c]) >= kLargeMean<A>;
  result.scale = large ? A(0.5) : A(1);
#pragma unroll
  for (int c = 0; c < WIDTH; ++c) {
    result.a[c] = moments.grad_mean != nullptr ? result.a[c] * mean_scale : A(0);
    // A variance that the loss does not use sends no gradient, also where it has no degrees of freedom.
    const bool sends = result.has_var && result.b[c] != A(0);
    result.b[c] = sends ? result.b[c] * var_scale * (large ? A(2) : A(1)) : A(0);
    result.mean[c] = result.has_var ? result.mean[c] * result.scale : A(0);
  }
  return result;
}

// Features of a thread in registers, and the gradients to add to theirs.
template <class T, int WIDTH>
struct BackwardTile {
  Vector<T, WIDTH> x[kElementwiseTile], grad[kElementwiseTile];
};

// A thread's rows: out = [grad +] a + b * (x - mean), or 0 where RELU and x <= 0.
template <bool ADD, bool RELU, class T, int WIDTH>
struct BackwardRows {
  const ColumnLayer& layer;
  const ThreadShare& share;

  // Rows beyond the last are the last again, so that tiles need no masks.
  __device__ __forceinline__ int64_t row(int begin, int r) const { return min(begin + r, share.rows.end - 1); }

  __device__ __forceinline__ BackwardTile<T, WIDTH> load(int begin) const {
    const T* x = static_cast<const T*>(layer.x) + share.column;
    const T* grad = static_cast<const T*>(layer.grad) + share.column;
    BackwardTile<T, WIDTH> tile;
#pragma unroll
    for (int r = 0; r < kElementwiseTile; ++r) {
      tile.x[r] = load_vector<WIDTH>(x + row(begin, r) * layer.row_stride);
      if constexpr (ADD) tile.grad[r] = load_vector<WIDTH>(grad + row(begin, r) * layer.grad_stride);
    }
    return tile;
  }

  template <class A>
  __device__ __forceinline__ void store(int begin, const BackwardTile<T, WIDTH>& tile,
                                        const Coefficients<A, WIDTH>& of) const {
    T* out = static_cast<T*>(layer.out) + share.column;
#pragma unroll
    for (int r = 0; r < kElementwiseTile; ++r) {
      A result[WIDTH];
#pragma unroll
      for (int c = 0; c < WIDTH; ++c) {
        const A x = tile.x[r][c];
          A sum = scaled_gradient(of.a[c], of.b[c], of.has_var ? x : A(0), of.mean[c], of.scale);
        if constexpr (ADD) sum += tile.grad[r][c];
        result[c] = RELU && x <= A(0) ? A(0) : sum;
      }
      store_vector(out + row(begin, r) * layer.out_stride, to_vector<T>(result));
    }
  }
};

// The first tile is on its way while the coefficients are worked out. Their places come before it: a division is a
// call, which waits for all loads.
template <bool ADD, bool RELU, int WIDTH, class T, class A>
__device__ __forceinline__ void backward_rows(const ColumnLayer& layer, const ThreadShare& share,
                                              const MomentGradients<A>& moments, const int64_t& rows) {
  const BackwardRows<ADD, RELU, T, WIDTH> thread{layer, share};
  int64_t at[WIDTH];
  layer.packed(share.column, at);
  int row = share.rows.begin;
  BackwardTile<T, WIDTH> tile = thread.load(row);
  const Coefficients<A, WIDTH> of = load_coefficients(at, moments, rows);
  for (;; tile = thread.load(row)) {
    thread.store(row, tile, of);
    row += kElementwiseTile;
    if (row >= share.rows.end) break;
  }
}

template <bool RELU, int WIDTH, class T, class A>
__device__ __forceinline__ void backward_strip(const ColumnLayer& layer, const MomentGradients<A>& moments,
                                               const int64_t& rows) {
  const ThreadShare share = thread_share<WIDTH>(layer, kElementwiseTile);
  if (share.rows.begin == share.rows.end) return;
  if (layer.grad != nullptr) {
    backward_rows<true, RELU, WIDTH, T>(layer, share, moments, rows);
  } else {
    backward_rows<false, RELU, WIDTH, T>(layer, share, moments, rows);
  }
}

// Five blocks to a multiprocessor: without the bound, the compiler saves registers and has fewer loads in flight.
template <class T, class A>
__global__ void __launch_bounds__(kThreads, 5)
    moments_backward_kernel(const __grid_constant__ ColumnLayers list, BackwardArguments<A> arguments) {
  constexpr int WIDTH = kVectorBytes / sizeof(T);
  const int index = find_layer(list, blockIdx.x);
  const ColumnLayer& layer = list.layers[index];
  const int64_t& rows = arguments.count[arguments.first_layer + index];
  if (layer.vectors) {
    backward_strip<false, WIDTH, T>(layer, arguments.moments, rows);
  } else {
    backward_strip<false, 1, T>(layer, arguments.moments, rows);
  }
}

}  // namespace moment_ops
