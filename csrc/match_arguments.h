// The arguments of `match_`, from tensors to pointers; the same for every backend.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "device/match.h"

namespace moment_ops {

using torch::stable::Tensor;

template <class A>
inline A* data(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<A*>(tensor->mutable_data_ptr()) : nullptr;
}

// The tensors and numbers as the schema has them.
// options: (decay) of a moving average; (lr, beta1, beta2, eps, gradient scale) of ADAM.
// state: the vectors per quantity, then `started` per column of a moving average, then the step.
struct MatchTensors {
  Tensor target_mean;
  std::optional<Tensor> target_var;
  double mean_scale, var_scale;
  std::optional<Tensor> mean_weight, var_weight;
  double reduction;
  Average kind;
  std::vector<double> options;
  std::vector<Tensor> state;
  bool update;
  Tensor grad_mean;
  std::optional<Tensor> grad_var;
};

template <class A>
struct MatchState {
  MatchVectors<A> mean, var;  // var.target is null where means alone are matched
  uint8_t* started = nullptr;
  int64_t* step = nullptr;
  AdamSchedule adam{};
  MatchParameters<A> parameters{};  // but for what depends on the step
};

template <class A>
inline MatchState<A> unpack(const MatchTensors& t) {
  MatchState<A> s;
  s.mean.target = data<A>(t.target_mean);
  s.mean.weight = data<A>(t.mean_weight);
  s.mean.scale = A(t.mean_scale);
  s.mean.grad = data<A>(t.grad_mean);
  s.var.target = data<A>(t.target_var);
  s.var.weight = data<A>(t.var_weight);
  s.var.scale = A(t.var_scale);
  s.var.grad = data<A>(t.grad_var);
  s.parameters.reduction = A(t.reduction);
  s.parameters.update = t.update && t.kind != Average::none;
  const bool has_var = t.target_var.has_value();
  if (t.kind == Average::moving) {
    s.parameters.decay = A(t.options[0]);
    s.parameters.one_minus_decay = A(1 - t.options[0]);
    s.mean.average = data<A>(t.state[0]);
    if (has_var) s.var.average = data<A>(t.state[1]);
    s.started = data<uint8_t>(t.state[t.state.size() - 2]);
  } else if (t.kind == Average::adam) {
    s.adam = adam_schedule(t.options[0], t.options[1], t.options[2]);
    s.parameters.beta1_complement = A(1 - t.options[1]);
    s.parameters.beta2 = A(t.options[2]);
    s.parameters.beta2_complement = A(1 - t.options[2]);
    s.parameters.eps = A(t.options[3]);
    s.parameters.gradient_scale = A(t.options[4]);
    MatchVectors<A>* quantities[] = {&s.mean, &s.var};
    for (int i = 0; i < (has_var ? 2 : 1); ++i) {
      quantities[i]->average = data<A>(t.state[3 * i]);
      quantities[i]->exp_avg = data<A>(t.state[3 * i + 1]);
      quantities[i]->exp_avg_sq = data<A>(t.state[3 * i + 2]);
    }
  }
  if (t.kind != Average::none) s.step = data<int64_t>(t.state.back());
  return s;
}

}  // namespace moment_ops
