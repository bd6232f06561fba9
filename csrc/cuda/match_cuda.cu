// match_ on the GPU.
#include "cuda/layers_cuda.h"
#include "cuda/operators_cuda.h"

namespace moment_ops::cuda {

namespace {

// The launch that finishes the loss needs a ticket, and a partial loss per strip.
struct DeviceLosses {
  Tensor losses;
  DeviceWorkspace workspace;
  LossWorkspace pointers;

  DeviceLosses(const Tensor& like, const Plan& plan, int strips)
      : losses(torch::stable::new_empty(like, {strips}, torch::headeronly::ScalarType::Double)),
        workspace(make_workspace(like, plan, 1)),
        pointers{data<double>(losses), workspace.pointers.tickets - 1, strips} {}
};

template <class Average, class A>
void match_moments(const MatchArguments<Tensor>& from, const Tensor& mean, const std::optional<Tensor>& var,
                   cudaStream_t stream) {
  const int64_t columns = from.target_mean.numel();
  const DeviceLosses losses(from.target_mean, Plan{}, match_blocks<A>(columns));
  auto matching = make_matching<Average, A>(from);
  matching.batch_mean = nullptr;
  launch_match_moments(data<A>(mean), from.target_var ? data<A>(var) : nullptr, columns, losses.pointers, matching,
                       stream);
}

template <class Average, class T, class A>
void match_features(const MatchArguments<Tensor>& from, cudaStream_t stream) {
  const std::vector<Layer> layers = make_layers(from.input, 0);
  // State at permuted places would be read a sector per number: reduce first, then match in packed order.
  for (const Layer& layer : layers) {
    if (layer.logical_order) continue;
    std::optional<Tensor> batch_var;
    if (from.target_var) batch_var = torch::stable::empty_like(from.target_mean);
    moments(from.input, 0, from.correction, *from.batch_mean, batch_var);
    return match_moments<Average, A>(from, *from.batch_mean, batch_var, stream);
  }
  const Launches launches = plan_launches(make_column_layers(layers), sizeof(T), kReductionTile);
  const DeviceLosses losses(from.target_mean, launches.total, launches.total.strips);
  launch_match_features<T>(launches, losses.workspace.pointers, losses.pointers, make_matching<Average, A>(from),
                           stream);
}

}  // namespace

void match_(const MatchArguments<Tensor>& from) {
  const torch::stable::accelerator::DeviceGuard guard(from.target_mean.get_device_index());
  const cudaStream_t stream = current_stream(from.target_mean.get_device_index());
  dispatch_dtype(from.input.empty() ? *from.mean : from.input[0], [&](auto sample) {
    using T = decltype(sample);
    using A = accumulate_t<T>;
    dispatch_average(from.average_kind, [&](auto average) {
      using Average = decltype(average);
      if (from.input.empty()) {
        match_moments<Average, A>(from, *from.mean, from.var, stream);
      } else {
        match_features<Average, T, A>(from, stream);
      }
    });
  });
}

}  // namespace moment_ops::cuda
