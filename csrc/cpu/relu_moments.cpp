// relu_moments and its backward on the CPU. Outputs are allocated, and arguments checked, in Python.
#include "cpu/relu_moments.h"

#include <type_traits>

#include "cpu/column_gradients.h"
#include "cpu/reduce_columns.h"
#include "data.h"

namespace moment_ops::cpu {
namespace {

// Rows that are handled together: eight read and eight written, a power of two apart, would fall into one set of the L1
// cache and run twice as slowly.
constexpr int kTapRows = 4;
// One layer has to keep all threads busy.
constexpr int64_t kTapStripBytes = 8 * 1024;

// torch's ReLU on the CPU: everything below zero becomes zero; NaN and -0 stay.
inline double relu(double value) { return value < 0 ? 0 : value; }
inline float relu(float value) { return value < 0 ? 0 : value; }
inline Half relu(Half value) {
  const bool below = value.bits > 0x8000u && value.bits <= 0xFC00u;
  return {static_cast<uint16_t>(below ? 0 : value.bits)};
}
inline BFloat16 relu(BFloat16 value) {
  const bool below = value.bits > 0x8000u && value.bits <= 0xFF80u;
  return {static_cast<uint16_t>(below ? 0 : value.bits)};
}

// The ReLU of a block of rows goes to `y`, the moments of what is stored there to `mean` and `m2`.
template <class T, class A>
inline void relu_block(const T* x, int64_t x_stride, const A* bias, int64_t rows, int64_t columns, T* y,
                       int64_t y_stride, A* pivot, A* mean, A* m2) {
  const auto pass = [=](auto has_bias) {
    const auto tile_at = [=](int64_t row) {
      const T* from = x + row * x_stride;
      T* to = y + row * y_stride;
      return [=](int r, int64_t column) {
        T value = from[r * x_stride + column];
        // Rounded before the ReLU, as by an addition of its own.
        if (has_bias) store(value, load(value) + bias[column]);
        value = relu(value);
        to[r * y_stride + column] = value;
        return load(value);
      };
    };
    block_moments<kTapRows>(tile_at, rows, columns, pivot, mean, m2);
  };
  if (bias) {
    pass(std::true_type{});
  } else {
    pass(std::false_type{});
  }
}

template <class T>
struct ReluLoops;

#define MOMENT_OPS_RELU_LOOPS(T)                                                                                    \
  template <>                                                                                                       \
  struct ReluLoops<T> {                                                                                             \
    using A = accumulate_t<T>;                                                                                      \
    MOMENT_OPS_CLONES static void block(const T* x, int64_t x_stride, const A* bias, int64_t rows, int64_t columns, \
                                        T* y, int64_t y_stride, A* pivot, A* mean, A* m2) {                         \
      relu_block(x, x_stride, bias, rows, columns, y, y_stride, pivot, mean, m2);                                   \
    }                                                                                                               \
  };
MOMENT_OPS_RELU_LOOPS(double)
MOMENT_OPS_RELU_LOOPS(float)
MOMENT_OPS_RELU_LOOPS(Half)
MOMENT_OPS_RELU_LOOPS(BFloat16)
#undef MOMENT_OPS_RELU_LOOPS

// The bias of every column, in memory order; empty without one.
template <class T, class A>
std::vector<A> column_bias(const Layer& layer, const std::optional<Tensor>& bias) {
  if (!bias) return {};
  const T* values = static_cast<const T*>(bias->const_data_ptr());
  // Channels are the first feature dimension: outermost in the packed order.
  const int64_t channel_columns = layer.columns / bias->numel();
  std::vector<A> result(layer.columns);
  for_each_logical(layer, 0, layer.columns,
                   [&](int64_t column, int64_t logical) { result[column] = load(values[logical / channel_columns]); });
  return result;
}

// Rows that become relu(x + bias) on their way and are kept in `y`.
template <class T>
struct ReluRows {
  using A = accumulate_t<T>;
  T* y;
  int64_t y_stride;
  std::vector<A> bias;

  void operator()(const Layer& layer, const Strip& strip, int64_t row, int64_t rows, StripMoments<A>& out) const {
    ReluLoops<T>::block(layer.data<T>() + row * layer.row_stride + strip.begin, layer.row_stride,
                        bias.empty() ? nullptr : bias.data() + strip.begin, rows, strip.end - strip.begin,
                        y + row * y_stride + strip.begin, y_stride, out.pivot.data(), out.mean.data(), out.m2.data());
  }

  A value(const Layer&, int64_t row, int64_t column) const { return load(y[row * y_stride + column]); }
};

}  // namespace

void relu_moments(Tensor x, std::optional<Tensor> bias, int64_t correction, Tensor y, Tensor mean, Tensor var) {
  const std::vector<Layer> layers = make_layers({x}, 0);
  const Layer output = make_layer(y, 0, 0);
  dispatch_dtype(x, [&](auto sample) {
    using T = decltype(sample);
    using A = accumulate_t<T>;
    const ReluRows<T> rows{data<T>(y), output.row_stride, column_bias<T, A>(layers[0], bias)};
    const auto store_moments = [&](int64_t, const Strip& strip, const A* means, const A* variances) {
      scatter(layers[0], means, strip.begin, strip.end, data<A>(mean));
      scatter(layers[0], variances, strip.begin, strip.end, data<A>(var));
    };
    reduce_columns<T>(layers, make_strips<A>(layers, kTapStripBytes), correction, store_moments, rows);
  });
}

void relu_moments_backward(std::optional<Tensor> grad, std::optional<Tensor> grad_mean, std::optional<Tensor> grad_var,
                           Tensor y, Tensor mean, int64_t correction, Tensor out) {
  const std::vector<Tensor> added = grad ? std::vector<Tensor>{*grad} : std::vector<Tensor>{};
  const int64_t rows = y.size(0);
  column_gradients<true>(added, grad_mean, grad_var, {y}, mean, &rows, 0, correction, std::nullopt, {out});
}

}  // namespace moment_ops::cpu
