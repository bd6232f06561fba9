// The gradient pass over columns: out = [grad +] a + b * (x - mean), for features and for what a ReLU made of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/reduce_columns.h"
#include "cpu/stream_store.h"
#include "device/range.h"

namespace moment_ops::cpu {

// Rows that are handled together share the loads of the coefficients. Rows a power of two apart fall into one set of
// the L1 cache, which holds eight lines: four rows read and written, or two to which gradients are added.
inline constexpr int kBackwardRows = 4;
inline constexpr int kAddedRows = 2;
// Columns whose coefficients are made at once.
inline constexpr int64_t kBackwardStrip = 4096;
// The fewest rows that are worth making the coefficients of a strip.
inline constexpr int64_t kFewestRows = 16;
// Columns that pass through the L1 cache on their way to memory, where gradients are streamed.
inline constexpr int64_t kStreamColumns = 256;

// out = grad + a + b * (x - mean), with b and mean as in scaled_gradient; MASKED, 0 where x <= 0: the mask of torch's
// ReLU on its output, which NaN passes. Without b, the gradient of a mean alone, which features that are NaN do not
// touch.
template <int ROWS, bool ADD, bool MASKED, bool VAR, class T, class A>
inline void apply_rows(const T* __restrict x, int64_t x_stride, const T* __restrict grad, int64_t grad_stride,
                       const A* __restrict a, const A* __restrict b, const A* __restrict mean, A scale,
                       int64_t columns, T* __restrict out, int64_t out_stride) {
#pragma GCC ivdep
  for (int64_t j = 0; j < columns; ++j) {
    for (int r = 0; r < ROWS; ++r) {
      const A feature = load(x[r * x_stride + j]);
      A value = VAR ? scaled_gradient(a[j], b[j], feature, mean[j], scale) : a[j];
      if (ADD) value += load(grad[r * grad_stride + j]);
      if (MASKED) value = feature <= 0 ? A(0) : value;
      store(out[r * out_stride + j], value);
    }
  }
}

template <class T, bool MASKED>
struct BackwardLoops;

#define MOMENT_OPS_BACKWARD_LOOPS(T, MASKED)                                                                           \
  template <>                                                                                                          \
  struct BackwardLoops<T, MASKED> {                                                                                    \
    using A = accumulate_t<T>;                                                                                         \
    template <int ROWS>                                                                                                \
    static inline void rows(const T* x, int64_t x_stride, const T* grad, int64_t grad_stride, const A* a, const A* b,  \
                            const A* mean, A scale, int64_t columns, T* out, int64_t out_stride) {                     \
      if (grad && b) {                                                                                                 \
        apply_rows<ROWS, true, MASKED, true>(x, x_stride, grad, grad_stride, a, b, mean, scale, columns, out,          \
                                             out_stride);                                                              \
      } else if (grad) {                                                                                               \
        apply_rows<ROWS, true, MASKED, false>(x, x_stride, grad, grad_stride, a, b, mean, scale, columns, out,         \
                                              out_stride);                                                             \
      } else if (b) {                                                                                                  \
        apply_rows<ROWS, false, MASKED, true>(x, x_stride, grad, grad_stride, a, b, mean, scale, columns, out,         \
                                              out_stride);                                                             \
      } else {                                                                                                         \
        apply_rows<ROWS, false, MASKED, false>(x, x_stride, grad, grad_stride, a, b, mean, scale, columns, out,        \
                                               out_stride);                                                            \
      }                                                                                                                \
    }                                                                                                                  \
    MOMENT_OPS_CLONES static void tile(const T* x, int64_t x_stride, const T* grad, int64_t grad_stride, const A* a,   \
                                       const A* b, const A* mean, A scale, int64_t columns, T* out,                    \
                                       int64_t out_stride) {                                                           \
      rows<kBackwardRows>(x, x_stride, grad, grad_stride, a, b, mean, scale, columns, out, out_stride);                \
    }                                                                                                                  \
    MOMENT_OPS_CLONES static void pair(const T* x, int64_t x_stride, const T* grad, int64_t grad_stride, const A* a,   \
                                       const A* b, const A* mean, A scale, int64_t columns, T* out,                    \
                                       int64_t out_stride) {                                                           \
      rows<kAddedRows>(x, x_stride, grad, grad_stride, a, b, mean, scale, columns, out, out_stride);                   \
    }                                                                                                                  \
    MOMENT_OPS_CLONES static void single(const T* x, int64_t x_stride, const T* grad, int64_t grad_stride, const A* a, \
                                         const A* b, const A* mean, A scale, int64_t columns, T* out,                  \
                                         int64_t out_stride) {                                                         \
      rows<1>(x, x_stride, grad, grad_stride, a, b, mean, scale, columns, out, out_stride);                            \
    }                                                                                                                  \
  };
MOMENT_OPS_BACKWARD_LOOPS(double, false)
MOMENT_OPS_BACKWARD_LOOPS(float, false)
MOMENT_OPS_BACKWARD_LOOPS(Half, false)
MOMENT_OPS_BACKWARD_LOOPS(BFloat16, false)
MOMENT_OPS_BACKWARD_LOOPS(double, true)
MOMENT_OPS_BACKWARD_LOOPS(float, true)
MOMENT_OPS_BACKWARD_LOOPS(Half, true)
MOMENT_OPS_BACKWARD_LOOPS(BFloat16, true)
#undef MOMENT_OPS_BACKWARD_LOOPS

// The coefficients of a strip: a = scale * grad_mean / N and b = scale * 2 grad_var / (N - correction).
template <class A>
struct Coefficients {
  std::vector<A> a, b, mean, buffer;
  A scale = 1;  // of differences, as in scaled_gradient

  void resize(int64_t columns) {
    if (a.size() >= static_cast<size_t>(columns)) return;
    for (std::vector<A>* vector : {&a, &b, &mean, &buffer}) vector->resize(columns);
  }

  void fill(const Layer& layer, int64_t begin, int64_t end, const A* grad_mean, const A* grad_var, const A* packed_mean,
            double mean_scale, double var_scale) {
    const int64_t columns = end - begin;
    resize(columns);
    if (grad_mean) {
      const A* values = gather(layer, grad_mean, begin, end, buffer.data());
      for (int64_t j = 0; j < columns; ++j) a[j] = values[j] * A(mean_scale);
    } else {
      std::fill_n(a.begin(), columns, A(0));
    }
    if (grad_var) {
      const A* values = gather(layer, grad_var, begin, end, buffer.data());
      // A variance that the loss does not use sends no gradient, also where it has no degrees of freedom.
      for (int64_t j = 0; j < columns; ++j) b[j] = values[j] == 0 ? A(0) : values[j] * A(var_scale);
    }
    const A* values = gather(layer, packed_mean, begin, end, buffer.data());
    int32_t large = 0;
    for (int64_t j = 0; j < columns; ++j) {
      mean[j] = values[j];
      large |= std::abs(values[j]) >= kLargeMean<A>;
    }
    scale = large != 0 ? A(0.5) : A(1);
    if (large == 0) return;
    for (int64_t j = 0; j < columns; ++j) {
      b[j] /= scale;
      mean[j] *= scale;
    }
  }
};

// Rows of a strip that one worker handles.
struct RowsOfStrip {
  int64_t strip, begin, end;
};

// Strips, cut along their rows where there are too few to keep the workers busy. Every value is computed by itself, and
// cuts are between rows that are handled together: results do not depend on them.
inline std::vector<RowsOfStrip> cut_rows(const std::vector<Layer>& layers, const std::vector<Strip>& strips,
                                         int64_t workers) {
  const int64_t wanted = workers > 1 ? 2 * workers : 1;
  const int64_t per_strip = (wanted + static_cast<int64_t>(strips.size()) - 1) / static_cast<int64_t>(strips.size());
  std::vector<RowsOfStrip> pieces;
  for (size_t i = 0; i < strips.size(); ++i) {
    const int64_t rows = layers[strips[i].layer].rows;
    const int64_t even = (rows + per_strip - 1) / per_strip;
    const int64_t step = std::max(kFewestRows, (even + kBackwardRows - 1) / kBackwardRows * kBackwardRows);
    for (int64_t row = 0; row < rows; row += step) {
      pieces.push_back({static_cast<int64_t>(i), row, std::min(row + step, rows)});
    }
  }
  return pieces;
}

// `counts` are the rows of the statistics, per layer, and `grad` is empty or has one tensor per layer.
template <bool MASKED>
inline void column_gradients(const std::vector<Tensor>& grad, const std::optional<Tensor>& grad_mean,
                             const std::optional<Tensor>& grad_var, const std::vector<Tensor>& input,
                             const Tensor& mean, const int64_t* counts, int64_t dim, int64_t correction,
                             const std::optional<Tensor>& scale, const std::vector<Tensor>& out) {
  const std::vector<Layer> layers = make_layers(input, dim);
  const std::vector<Layer> outputs = make_layers(out, dim);
  const std::vector<Layer> added = make_layers(grad, dim);
  dispatch_dtype(input[0], [&](auto sample) {
    using T = decltype(sample);
    using A = accumulate_t<T>;
    using Loops = BackwardLoops<T, MASKED>;
    const auto packed = [](const std::optional<Tensor>& tensor) {
      return tensor ? static_cast<const A*>(tensor->const_data_ptr()) : nullptr;
    };
    const double factor = scale ? static_cast<double>(*packed(scale)) : 1.0;
    const std::vector<Strip> strips = make_strips<A>(layers, kBackwardStrip * sizeof(A));
    int64_t elements = 0;
    for (const Layer& layer : layers) elements += layer.rows * layer.columns;
    const bool stream = elements * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t workers = std::min(workers_for(elements), threads);
    const std::vector<RowsOfStrip> pieces = cut_rows(layers, strips, workers);
    std::vector<Coefficients<A>> scratch(threads);

    for_each_piece(pieces.size(), workers, [&](int64_t index, int64_t worker) {
      const RowsOfStrip& piece = pieces[index];
      const Strip& strip = strips[piece.strip];
      const Layer& layer = layers[strip.layer];
      const Layer& output = outputs[strip.layer];
      const double rows = static_cast<double>(counts[strip.layer]);
      Coefficients<A>& c = scratch[worker];
      c.fill(layer, strip.begin, strip.end, packed(grad_mean), packed(grad_var), packed(mean), factor / rows,
             2 * factor / (rows - static_cast<double>(correction)));
      alignas(64) T buffer[kBackwardRows * kStreamColumns];
      const int64_t block = stream ? kStreamColumns : kBackwardStrip;
      const int64_t together = added.empty() ? kBackwardRows : kAddedRows;
      const int64_t g_stride = added.empty() ? 0 : added[strip.layer].row_stride;
      for (int64_t row = piece.begin; row < piece.end;) {
        const int64_t step = row + together <= piece.end ? together : 1;
        const auto apply = step == kBackwardRows ? Loops::tile : step == kAddedRows ? Loops::pair : Loops::single;
        const T* x = layer.template data<T>() + row * layer.row_stride;
        const T* g = added.empty() ? nullptr : added[strip.layer].template data<T>() + row * g_stride;
        T* y = static_cast<T*>(output.tensor.mutable_data_ptr()) + row * output.row_stride;
        for (int64_t begin = strip.begin; begin < strip.end; begin += block) {
          const int64_t columns = std::min(block, strip.end - begin);
          const int64_t at = begin - strip.begin;
          apply(x + begin, layer.row_stride, g ? g + begin : nullptr, g_stride, c.a.data() + at,
                grad_var ? c.b.data() + at : nullptr, c.mean.data() + at, c.scale, columns, stream ? buffer : y + begin,
                stream ? kStreamColumns : output.row_stride);
          for (int64_t r = 0; stream && r < step; ++r) {
            stream_store(buffer + r * kStreamColumns, y + r * output.row_stride + begin, columns * sizeof(T));
          }
        }
        row += step;
      }
      if (stream) stream_fence();
    });
  });
}

}  // namespace moment_ops::cpu
