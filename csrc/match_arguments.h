// The arguments of `match_`, for every backend.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "data.h"
#include "device/match.h"

namespace moment_ops {

// In the order of the schema, in moment_ops/ops/match.py. With features in `input`, their moments are reduced first, and
// the batch's means go to `batch_mean`; without, `mean` and `var` hold the moments.
template <class Tensor>
struct MatchArguments {
  static constexpr size_t kCount = 19;

  std::optional<Tensor> mean, var;
  std::vector<Tensor> input;
  int64_t correction;
  Tensor target_mean;
  std::optional<Tensor> target_var;
  double mean_scale, var_scale;
  std::optional<Tensor> mean_weight, var_weight;
  double reduction;
  int64_t average_kind;
  std::vector<double> options;
  std::vector<Tensor> state;  // per quantity what the average keeps; `started` where it starts; the step
  bool update;
  Tensor loss;
  std::optional<Tensor> batch_mean;
  Tensor grad_mean;
  std::optional<Tensor> grad_var;
};

template <class Average, class A, class Tensor>
inline Matching<Average, A> make_matching(const MatchArguments<Tensor>& from) {
  const auto vectors = [&](const auto& target, const auto& weight, double scale, const Tensor* state, const auto& grad) {
    MatchVectors<Average, A> result{data<A>(target), data<A>(weight), A(scale), {}, data<A>(grad)};
    for (int k = 0; k < Average::kKept; ++k) result.kept[k] = data<A>(state[k]);
    return result;
  };
  Matching<Average, A> result{};
  const Tensor* state = from.state.data();
  result.mean = vectors(from.target_mean, from.mean_weight, from.mean_scale, state, from.grad_mean);
  if (from.target_var) {
    result.var = vectors(from.target_var, from.var_weight, from.var_scale, state + Average::kKept, from.grad_var);
  }
  result.parameters = typename Average::template Parameters<A>(from.options.data());
  result.reduction = A(from.reduction);
  result.update = from.update && Average::kKept > 0;
  if (Average::kStarts) result.started = data<uint8_t>(from.state[from.state.size() - 2]);
  if (Average::kKept > 0) result.step = data<int64_t>(from.state.back());
  result.correction = from.correction;
  result.batch_mean = data<A>(from.batch_mean);
  result.loss = data<A>(from.loss);
  return result;
}

}  // namespace moment_ops
