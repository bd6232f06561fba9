// match_ on the GPU.
#include "cuda/layers_cuda.h"
#include "cuda/operators_cuda.h"
#include "match_arguments.h"

namespace moment_ops::cuda {

namespace {

// The launch that finishes the loss needs a ticket, and a partial loss per strip.
template <class A>
MatchArguments<A> make_arguments(const MatchTensors& tensors, int64_t correction, const Tensor& loss,
                                 const std::optional<Tensor>& batch_mean, const Tensor& losses, unsigned int* ticket,
                                 int strips) {
  const MatchState<A> state = unpack<A>(tensors);
  MatchArguments<A> arguments{};
  arguments.mean = state.mean;
  arguments.var = state.var;
  arguments.started = state.started;
  arguments.parameters = state.parameters;
  arguments.adam = state.adam;
  arguments.step = state.step;
  arguments.batch_mean = data<A>(batch_mean);
  arguments.correction = correction;
  arguments.losses = static_cast<double*>(losses.mutable_data_ptr());
  arguments.ticket = ticket;
  arguments.loss = static_cast<A*>(loss.mutable_data_ptr());
  arguments.strips = strips;
  return arguments;
}

}  // namespace

void match_(std::optional<Tensor> mean, std::optional<Tensor> var, std::vector<Tensor> input, int64_t correction,
            Tensor target_mean, std::optional<Tensor> target_var, double mean_scale, double var_scale,
            std::optional<Tensor> mean_weight, std::optional<Tensor> var_weight, double reduction, int64_t average,
            std::vector<double> options, std::vector<Tensor> state, bool update, Tensor loss,
            std::optional<Tensor> batch_mean, Tensor grad_mean, std::optional<Tensor> grad_var) {
  using torch::headeronly::ScalarType;
  const torch::stable::accelerator::DeviceGuard guard(target_mean.get_device_index());
  const cudaStream_t stream = current_stream(target_mean.get_device_index());
  const auto kind = static_cast<Average>(average);
  const std::vector<Layer> layers = make_layers(input, 0);
  const MatchTensors tensors{target_mean, target_var, mean_scale, var_scale, mean_weight, var_weight, reduction,
                             kind,        options,    state,      update,    grad_mean,   grad_var};
  const auto from_moments = [&](auto accumulate, const Tensor& all_mean, const std::optional<Tensor>& all_var) {
    using A = decltype(accumulate);
    const int64_t columns = target_mean.numel();
    const int blocks = match_blocks<A>(columns);
    const Tensor losses = torch::stable::new_empty(target_mean, {blocks}, ScalarType::Double);
    const DeviceWorkspace workspace = make_workspace(target_mean, Plan{}, 1);
    const auto arguments =
        make_arguments<A>(tensors, correction, loss, {}, losses, workspace.pointers.tickets - 1, blocks);
    launch_match_moments<A>(kind, data<A>(all_mean), target_var ? data<A>(all_var) : nullptr, columns, arguments,
                            stream);
  };

  dispatch_dtype(input.empty() ? *mean : input[0], [&](auto sample) {
    using T = decltype(sample);
    using A = accumulate_t<T>;
    if (input.empty()) return from_moments(A{}, *mean, var);
    // State at permuted places would be read a sector per number: reduce first, then match in packed order.
    for (const Layer& layer : layers) {
      if (layer.logical_order) continue;
      std::optional<Tensor> batch_var;
      if (target_var) batch_var = torch::stable::empty_like(target_mean);
      moments(input, 0, correction, *batch_mean, batch_var);
      return from_moments(A{}, *batch_mean, batch_var);
    }
    const Launches launches = plan_launches(make_column_layers(layers), sizeof(T), kReductionTile);
    const int strips = launches.total.strips;
    const Tensor losses = torch::stable::new_empty(target_mean, {strips}, ScalarType::Double);
    const DeviceWorkspace workspace = make_workspace(target_mean, launches.total, 1);
    const auto arguments =
        make_arguments<A>(tensors, correction, loss, batch_mean, losses, workspace.pointers.tickets - 1, strips);
    launch_match_features<T, A>(kind, launches, workspace.pointers, arguments, stream);
  });
}

}  // namespace moment_ops::cuda
