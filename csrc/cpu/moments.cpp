// moments and moments_backward on the CPU. Outputs are allocated, and arguments checked, in Python.
#include "cpu/moments.h"

#include "cpu/column_gradients.h"
#include "cpu/reduce_columns.h"

namespace moment_ops::cpu {

void moments(std::vector<Tensor> input, int64_t dim, int64_t correction, Tensor mean, std::optional<Tensor> var) {
  const std::vector<Layer> layers = make_layers(input, dim);
  dispatch_dtype(input[0], [&](auto sample) {
    using T = decltype(sample);
    using A = accumulate_t<T>;
    A* mean_out = static_cast<A*>(mean.mutable_data_ptr());
    A* var_out = var ? static_cast<A*>(var->mutable_data_ptr()) : nullptr;
    const auto store_moments = [&](int64_t, const Strip& strip, const A* means, const A* variances) {
      const Layer& layer = layers[strip.layer];
      scatter(layer, means, strip.begin, strip.end, mean_out);
      if (var_out) scatter(layer, variances, strip.begin, strip.end, var_out);
    };
    reduce_columns<T>(layers, make_strips<A>(layers), correction, store_moments);
  });
}

void moments_backward(std::vector<Tensor> grad, std::optional<Tensor> grad_mean, std::optional<Tensor> grad_var,
                      std::vector<Tensor> input, Tensor mean, Tensor count, int64_t dim, int64_t correction,
                      std::optional<Tensor> scale, std::vector<Tensor> out) {
  const int64_t* counts = static_cast<const int64_t*>(count.const_data_ptr());
  column_gradients<false>(grad, grad_mean, grad_var, input, mean, counts, dim, correction, scale, out);
}

}  // namespace moment_ops::cpu
