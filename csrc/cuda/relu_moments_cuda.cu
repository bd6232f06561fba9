// relu_moments and its backward on the GPU. Outputs are allocated, and arguments checked, in Python.
#include "cuda/layers_cuda.h"
#include "cuda/operators_cuda.h"
#include "data.h"

namespace moment_ops::cuda {

void relu_moments(Tensor x, std::optional<Tensor> bias, int64_t correction, Tensor y, Tensor mean, Tensor var) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x.get_device_index());
  ColumnLayer layer = make_column_layers(make_layers({x}, 0))[0];
  STD_TORCH_CHECK(layer.columns < (int64_t{1} << 31), "moment_ops: a tap of 2^31 or more columns");
  const Layer output = make_layer(y, 0, 0);
  dispatch_dtype(x, [&](auto sample) {
    using T = decltype(sample);
    using A = accumulate_t<T>;
    layer.vectors &= allows_vectors(y.const_data_ptr(), output.row_stride, output.rows, sizeof(T));
    const Plan plan = plan_layer(layer, sizeof(T), kReductionTile);
    const DeviceWorkspace workspace = make_workspace(mean, plan, 0);
    const ReluArguments<T> arguments{data<T>(bias), static_cast<T*>(y.mutable_data_ptr()), output.row_stride,
                                     bias ? static_cast<uint32_t>(layer.columns / bias->numel()) : 1};
    launch_relu_moments<T, A>(layer, plan, arguments, workspace.pointers, {data<A>(mean), data<A>(var), correction},
                              stream);
  });
}

void relu_moments_backward(std::optional<Tensor> grad, std::optional<Tensor> grad_mean, std::optional<Tensor> grad_var,
                           Tensor y, Tensor mean, int64_t correction, Tensor out) {
  const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  const cudaStream_t stream = current_stream(y.get_device_index());
  ColumnLayer layer = make_column_layers(make_layers({y}, 0))[0];
  dispatch_dtype(y, [&](auto sample) {
    using T = decltype(sample);
    using A = accumulate_t<T>;
    const auto attach = [&](const Tensor& tensor, int64_t& stride) {
      const Layer other = make_layer(tensor, 0, 0);
      stride = other.row_stride;
      layer.vectors &= allows_vectors(tensor.const_data_ptr(), other.row_stride, other.rows, sizeof(T));
    };
    layer.out = out.mutable_data_ptr();
    attach(out, layer.out_stride);
    if (grad) {
      layer.grad = grad->const_data_ptr();
      attach(*grad, layer.grad_stride);
    }
    const Plan plan = plan_layer(layer, sizeof(T), kElementwiseTile);
    launch_relu_moments_backward<T, A>(
        layer, plan, {data<A>(grad_mean), data<A>(grad_var), data<A>(mean), nullptr, correction}, stream);
  });
}

}  // namespace moment_ops::cuda
