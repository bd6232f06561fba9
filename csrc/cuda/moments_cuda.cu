// moments and moments_backward on the GPU. Outputs are allocated, and arguments checked, in Python.
#include "cuda/layers_cuda.h"
#include "cuda/operators_cuda.h"
#include "data.h"

namespace moment_ops::cuda {

void moments(std::vector<Tensor> input, int64_t dim, int64_t correction, Tensor mean, std::optional<Tensor> var) {
  const torch::stable::accelerator::DeviceGuard guard(input[0].get_device_index());
  const cudaStream_t stream = current_stream(input[0].get_device_index());
  const std::vector<ColumnLayer> layers = make_column_layers(make_layers(input, dim));
  dispatch_dtype(input[0], [&](auto sample) {
    using T = decltype(sample);
    using A = accumulate_t<T>;
    const Launches launches = plan_launches(layers, sizeof(T), kReductionTile);
    const DeviceWorkspace workspace = make_workspace(mean, launches.total, 0);
    launch_moments<T, A>(launches, workspace.pointers, {data<A>(mean), data<A>(var), correction}, stream);
  });
}

void moments_backward(std::vector<Tensor> grad, std::optional<Tensor> grad_mean, std::optional<Tensor> grad_var,
                      std::vector<Tensor> input, Tensor mean, Tensor count, int64_t dim, int64_t correction,
                      std::optional<Tensor> scale, std::vector<Tensor> out) {
  const torch::stable::accelerator::DeviceGuard guard(input[0].get_device_index());
  const cudaStream_t stream = current_stream(input[0].get_device_index());
  std::vector<ColumnLayer> layers = make_column_layers(make_layers(input, dim));
  const std::vector<Layer> outputs = make_layers(out, dim);
  const std::vector<Layer> added = make_layers(grad, dim);
  dispatch_dtype(input[0], [&](auto sample) {
    using T = decltype(sample);
    using A = accumulate_t<T>;
    for (size_t i = 0; i < layers.size(); ++i) {
      ColumnLayer& layer = layers[i];
      const auto attach = [&](const Layer& other, int64_t& stride) {
        stride = other.row_stride;
        layer.vectors &= allows_vectors(other.tensor.const_data_ptr(), other.row_stride, other.rows, sizeof(T));
      };
      layer.out = outputs[i].tensor.mutable_data_ptr();
      attach(outputs[i], layer.out_stride);
      if (added.empty()) continue;
      layer.grad = added[i].tensor.const_data_ptr();
      attach(added[i], layer.grad_stride);
    }
    const Launches launches = plan_launches(layers, sizeof(T), kElementwiseTile);
    const MomentGradients<A> moments{data<A>(grad_mean), data<A>(grad_var), data<A>(mean), data<A>(scale), correction};
    launch_moments_backward<T, A>(launches, {moments, data<int64_t>(count), 0}, stream);
  });
}

}  // namespace moment_ops::cuda
